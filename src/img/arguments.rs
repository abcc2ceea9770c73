//! Arguments that most subcommands have.

use super::How;

/// How an image is named.
#[derive(clap::Args)]
pub(super) struct ImageArgs {
    /// An object that defines a secret: secret,id=ID,file=PATH
    #[arg(long, value_name = "OBJECT")]
    pub(super) object: Vec<String>,
    /// The image's name is a list of options (driver=qcow2,file.filename=…)
    #[arg(long)]
    pub(super) image_opts: bool,
    /// The image's format
    #[arg(short = 'f', long, value_name = "FORMAT")]
    pub(super) format: Option<String>,
}

impl ImageArgs {
    /// How the image is to be opened, as far as its name's options say: to be read, with what lies below it.
    pub(super) fn how(&self) -> How<'_> {
        How { format: self.format.as_deref(), image_opts: self.image_opts, ..How::default() }
    }
}
