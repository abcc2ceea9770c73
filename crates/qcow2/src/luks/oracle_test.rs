//! Held against QEMU: what `qemu-img` encrypts is decrypted here to the byte, what is made here opens there, and key
//! slots that one side adds or erases are so for the other.
//!
//! Without `qemu-img` and `qemu-io` the tests fail: nothing is skipped.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use tempfile::TempDir;

use super::{CreateParams, Hash, Header, Iterations, LuksError, SlotChange};
use crate::cipher::{Aes, Cipher, CipherSpec, Iv, Mode, SECTOR};
use crate::{GuestOffset, HostOffset, L1Entry, L2Entry, L2Kind, LuksExtension};

const CLUSTER: usize = 64 << 10;
const SIZE: usize = 1 << 20;
const SECRET: &str = "cowhand";

/// Runs a tool to its end: its exit status, and all that it said.
fn run(tool: &str, args: &[&str]) -> (i32, String) {
    let output = Command::new(tool).args(args).env("LC_ALL", "C").stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|e| {
        panic!("cannot run {tool}: {e}. These tests hold the format against QEMU (Debian: apt install qemu-utils)")
    });
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&said).into_owned())
}

fn succeed(tool: &str, args: &[&str]) -> String {
    let (status, said) = run(tool, args);
    assert_eq!(status, 0, "{tool} {args:?}: {said}");
    said
}

/// A secret as QEMU's tools take it.
fn object(secret: &str) -> String {
    format!("secret,id=s,data={secret}")
}

/// Where QEMU has its encryption.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// LUKS in a QCOW2 image.
    Luks,
    /// The legacy method of QCOW2.
    Aes,
    /// LUKS alone, as block devices have it.
    Bare,
}

/// An image in a directory of its own, and a secret that opens it.
struct Image {
    kind: Kind,
    path: PathBuf,
    secret: &'static str,
    _dir: TempDir,
}

impl Image {
    fn new(kind: Kind, secret: &'static str, bytes: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        fs::write(&path, bytes).unwrap();
        Self { kind, path, secret, _dir: dir }
    }

    /// A QCOW2 image of 1 MiB made by `qemu-img`.
    fn by_qemu(kind: Kind, options: &str, secret: &'static str) -> Self {
        let image = Self::new(kind, secret, &[]);
        let options = format!("encrypt.key-secret=s,{options}");
        let args = ["create", "-q", "--object", &object(secret), "-f", "qcow2", "-o", &options, image.text(), "1M"];
        succeed("qemu-img", &args);
        image
    }

    /// One of QEMU's making, with [`WRITES`] in it. They are made once: each takes QEMU some two seconds, in which it
    /// measures how fast PBKDF2 is.
    fn by_qemu_with(number: usize) -> Self {
        static MADE: [OnceLock<Vec<u8>>; SPECS.len()] = [const { OnceLock::new() }; SPECS.len()];
        let bytes = MADE[number].get_or_init(|| {
            let (spec, hash) = SPECS[number];
            let image = Self::by_qemu(Kind::Luks, &options(spec, hash), SECRET);
            image.io(&WRITES);
            image.bytes()
        });
        Self::new(Kind::Luks, SECRET, bytes)
    }

    /// QEMU's image, with a LUKS header and a key of our own in place of its: the data is yet to be written.
    fn by_us(spec: CipherSpec, hash: Hash, secret: &'static str) -> (Self, Cipher) {
        let same_length = |known: &(CipherSpec, Hash)| known.0.key_bytes() == spec.key_bytes();
        let frame = Self::by_qemu_with(SPECS.iter().position(same_length).unwrap());
        let params = params(spec, hash);
        let (place, _, _) = frame.area();
        assert_eq!(params.area_len() as u64, place.len, "{spec:?}");
        let created = params.create(secret.as_bytes(), &entropy(params.entropy_len())).unwrap();
        frame.write(place.offset.get(), &created.area);
        (Self { secret, ..frame }, created.key.cipher().unwrap())
    }

    fn text(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// The image with its key, as QEMU's tools take it.
    fn opened(&self) -> String {
        let driver = match self.kind {
            Kind::Luks => "driver=qcow2,encrypt.format=luks,encrypt.key-secret=s",
            Kind::Aes => "driver=qcow2,encrypt.format=aes,encrypt.key-secret=s",
            Kind::Bare => "driver=luks,key-secret=s",
        };
        format!("{driver},file.filename={}", self.text())
    }

    /// Runs `qemu-io` commands, which must all succeed.
    fn io(&self, commands: &[&str]) {
        let (object, opened) = (object(self.secret), self.opened());
        let mut args = vec!["--object", &object, "--image-opts", &opened];
        commands.iter().for_each(|command| args.extend(["-c", command]));
        let said = succeed("qemu-io", &args);
        assert!(!said.contains("failed") && !said.contains("rror"), "{commands:?}: {said}");
    }

    /// The whole disk as QEMU decrypts it.
    fn content(&self) -> Vec<u8> {
        let raw = self.path.with_extension("raw");
        let (object, opened, out) = (object(self.secret), self.opened(), raw.to_str().unwrap());
        succeed("qemu-img", &["convert", "--object", &object, "--image-opts", &opened, "-O", "raw", out]);
        fs::read(raw).unwrap()
    }

    /// Whether QEMU opens the image with this secret.
    fn opens_in_qemu(&self, secret: &str) -> bool {
        let args = ["--object", &object(secret), "--image-opts", &self.opened(), "-c", "read 0 512"];
        let (status, said) = run("qemu-io", &args);
        assert!(status == 0 || said.contains("Invalid password"), "{said}");
        status == 0
    }

    /// Changes key slots with `qemu-img`, which knows `new` as a second secret.
    fn amend(&self, options: &str, new: &str) {
        let (new, opened) = (format!("secret,id=new,data={new}"), self.opened());
        let objects = ["--object", &object(self.secret), "--object", &new];
        succeed("qemu-img", &[&["amend"][..], &objects, &["--image-opts", "-o", options, &opened]].concat());
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        self.file().write_all_at(bytes, offset).unwrap();
    }

    fn file(&self) -> fs::File {
        fs::OpenOptions::new().read(true).write(true).open(&self.path).unwrap()
    }

    fn header(&self) -> crate::Header {
        let bytes = self.bytes();
        crate::Header::parse(&bytes[..CLUSTER], bytes.len() as u64).unwrap()
    }

    /// Where the LUKS header lies, the header, and all bytes of the area.
    fn area(&self) -> (LuksExtension, Header, Vec<u8>) {
        let place = self.header().luks_extension().unwrap().unwrap();
        let area = self.bytes()[place.offset.get() as usize..][..place.len as usize].to_vec();
        (place, Header::parse(&area, place).unwrap(), area)
    }

    /// Guest and host offset of each data cluster.
    fn clusters(&self) -> Vec<(GuestOffset, HostOffset)> {
        let (header, bytes) = (self.header(), self.bytes());
        let geometry = header.geometry();
        let word = |at: u64| u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap());
        let l1 = L1Entry::from_raw(word(header.l1_table_offset.get()));
        let l2 = l1.offset(&geometry).unwrap().expect("an L2 table").get();
        let entry = |index: u64| L2Entry::from_raw(word(l2 + index * 8)).decode(&geometry).unwrap();
        let data = (0..(SIZE / CLUSTER) as u64).filter_map(|index| match entry(index) {
            L2Kind::Data { host, .. } => Some((GuestOffset::new(index * CLUSTER as u64), host)),
            _ => None,
        });
        data.collect()
    }

    /// Writes a change of a slot to where it belongs, in the order that it is meant to be written in.
    fn apply(&self, change: &SlotChange) {
        let start = self.area().0.offset.get();
        self.write(start + change.material_offset, &change.material);
        self.write(start, &change.header.encode());
    }

    /// The whole disk as we decrypt it.
    fn decrypted(&self, cipher: &Cipher) -> Vec<u8> {
        let (bytes, mut disk) = (self.bytes(), vec![0; SIZE]);
        for (guest, host) in self.clusters() {
            let cluster = &mut disk[guest.get() as usize..][..CLUSTER];
            cluster.copy_from_slice(&bytes[host.get() as usize..][..CLUSTER]);
            cipher.decrypt(cipher.numbering().sector(guest, host).unwrap(), cluster).unwrap();
        }
        disk
    }
}

/// Written so that no cluster lies in the file where it lies on the disk, nor in the same order.
const WRITES: [&str; 5] =
    ["write -P 65 640k 64k", "write -P 66 64k 128k", "write -P 67 70k 3k", "write -P 68 0 512", "write -P 69 960k 64k"];

/// Bytes that differ; no entropy at all.
fn entropy(len: usize) -> Vec<u8> {
    (0..len as u32).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
}

const fn spec(mode: Mode, aes: Aes, iv: Iv) -> CipherSpec {
    CipherSpec { aes, mode, iv }
}

/// What QEMU's images are made with: each cipher, and in both modes each IV.
const SPECS: [(CipherSpec, Hash); 6] = [
    (spec(Mode::Xts, Aes::Aes256, Iv::Plain64), Hash::Sha256),
    (spec(Mode::Xts, Aes::Aes192, Iv::EssivSha256), Hash::Sha512),
    (spec(Mode::Xts, Aes::Aes128, Iv::Plain), Hash::Sha1),
    (spec(Mode::Cbc, Aes::Aes256, Iv::Plain64), Hash::Sha224),
    (spec(Mode::Cbc, Aes::Aes128, Iv::EssivSha256), Hash::Ripemd160),
    (spec(Mode::Cbc, Aes::Aes128, Iv::Plain), Hash::Sha384),
];

/// Options for `qemu-img` that say the same.
fn options(spec: CipherSpec, hash: Hash) -> String {
    let aes = 8 * spec.aes.key_bytes();
    let mode = if spec.mode == Mode::Xts { "xts" } else { "cbc" };
    let iv = match spec.iv {
        Iv::Plain => "plain",
        Iv::Plain64 => "plain64",
        Iv::EssivSha256 => "essiv,encrypt.ivgen-hash-alg=sha256",
    };
    format!(
        "encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg=aes-{aes},encrypt.cipher-mode={mode},\
         encrypt.ivgen-alg={iv},encrypt.hash-alg={}",
        hash.name()
    )
}

/// Every cipher that a header can have, each hash with some of them.
fn all_specs() -> impl Iterator<Item = (CipherSpec, Hash)> {
    let xts = [Aes::Aes128, Aes::Aes192, Aes::Aes256].map(|aes| (Mode::Xts, aes));
    let cbc = [Aes::Aes128, Aes::Aes256].map(|aes| (Mode::Cbc, aes));
    let ivs = [Iv::Plain, Iv::Plain64, Iv::EssivSha256];
    let ciphers = xts.into_iter().chain(cbc).flat_map(move |(mode, aes)| ivs.map(|iv| spec(mode, aes, iv)));
    let hashes = [Hash::Sha256, Hash::Sha1, Hash::Sha512, Hash::Sha224, Hash::Sha384, Hash::Ripemd160];
    ciphers.zip(hashes.into_iter().cycle())
}

fn params(cipher: CipherSpec, hash: Hash) -> CreateParams {
    CreateParams { cipher, hash, iterations: Iterations::MIN, digest_iterations: Iterations::MIN }
}

#[test]
fn edge_42_what_qemu_encrypts_is_decrypted_by_its_place_in_the_file() {
    for (number, (spec, hash)) in SPECS.into_iter().enumerate() {
        let image = Image::by_qemu_with(number);
        let (_, header, area) = image.area();
        assert_eq!((header.cipher(), header.hash()), (spec, hash));
        let unlocked = header.unlock(&area[..header.unlock_len() as usize], SECRET.as_bytes()).unwrap();
        assert!(image.clusters().iter().all(|(guest, host)| guest.get() != host.get()));
        let disk = image.decrypted(&unlocked.key.cipher().unwrap());
        assert!(disk == image.content(), "{spec:?} {hash:?}");
        assert!(disk[70 << 10..73 << 10].iter().all(|byte| *byte == 67), "{spec:?} {hash:?}");
        assert_eq!(header.unlock(&area, b"cowhanD").unwrap_err(), LuksError::NoSlotOpens);
    }
}

#[test]
fn edge_42_what_legacy_aes_encrypts_is_decrypted_by_its_place_on_the_disk() {
    for secret in ["short", "just 16 letters!", "more than the 16 that are taken"] {
        let image = Image::by_qemu(Kind::Aes, "encrypt.format=aes", secret);
        image.io(&WRITES);
        let disk = image.decrypted(&Cipher::legacy_aes(secret.as_bytes()));
        assert!(disk == image.content(), "{secret}");
        assert!(disk[70 << 10..73 << 10].iter().all(|byte| *byte == 67), "{secret}");
    }
}

#[test]
fn what_is_made_here_opens_in_qemu_and_holds_what_was_encrypted() {
    for (spec, hash) in all_specs() {
        let (image, cipher) = Image::by_us(spec, hash, "pässword with spaces");
        let pattern = |number: usize| 0x80 | number as u8;
        for (number, (guest, host)) in image.clusters().into_iter().enumerate() {
            let mut cluster = vec![pattern(number); CLUSTER];
            cipher.encrypt(cipher.numbering().sector(guest, host).unwrap(), &mut cluster).unwrap();
            image.write(host.get(), &cluster);
        }
        let disk = image.content();
        for (number, (guest, _)) in image.clusters().into_iter().enumerate() {
            let cluster = &disk[guest.get() as usize..][..CLUSTER];
            assert!(cluster.iter().all(|byte| *byte == pattern(number)), "{spec:?} {hash:?} {guest}");
        }
        assert!(!image.opens_in_qemu(SECRET));
        // And what QEMU writes with our key.
        image.io(&["write -P 70 100k 300k"]);
        assert!(image.decrypted(&cipher) == image.content(), "{spec:?} {hash:?}");
    }
}

#[test]
fn keys_that_are_added_and_erased_here_are_so_for_qemu() {
    let image = Image::by_qemu_with(0);
    let (_, header, area) = image.area();
    let key = header.unlock(&area, SECRET.as_bytes()).unwrap().key;
    let random = entropy(header.add_entropy_len());
    image.apply(&header.add_key(&key, b"second", Iterations::MIN, None, &random).unwrap());
    let (_, header, _) = image.area();
    image.apply(&header.add_key(&key, b"last", Iterations::MIN, Some(7), &random).unwrap());
    assert_eq!([SECRET, "second", "last", "none"].map(|s| image.opens_in_qemu(s)), [true, true, true, false]);

    let (_, header, _) = image.area();
    image.apply(&header.erase_key(0, &entropy(header.erase_entropy_len())).unwrap());
    assert_eq!([SECRET, "second", "last"].map(|s| image.opens_in_qemu(s)), [false, true, true]);
    let image = Image { secret: "last", ..image };
    image.amend("encrypt.state=active,encrypt.new-secret=new,encrypt.iter-time=10", "in the erased place");
    let (_, header, area) = image.area();
    assert_eq!(header.unlock(&area, b"in the erased place").unwrap().slot, 0);
}

#[test]
fn keys_that_qemu_adds_and_erases_are_so_here() {
    let image = Image::by_qemu_with(0);
    image.amend("encrypt.state=active,encrypt.new-secret=new,encrypt.keyslot=5,encrypt.iter-time=10", "fifth");
    let (_, header, area) = image.area();
    assert_eq!(header.active_slots().collect::<Vec<_>>(), [0, 5]);
    let needed = &area[..header.unlock_len() as usize];
    let [first, fifth] = [SECRET, "fifth"].map(|secret| header.unlock(needed, secret.as_bytes()).unwrap());
    assert_eq!((first.slot, fifth.slot), (0, 5));
    assert_eq!(first.key, fifth.key);

    image.amend("encrypt.state=inactive,encrypt.keyslot=0", "unused");
    let (_, header, area) = image.area();
    assert_eq!(header.active_slots().collect::<Vec<_>>(), [5]);
    assert_eq!(header.unlock(&area, SECRET.as_bytes()).unwrap_err(), LuksError::NoSlotOpens);
    assert_eq!(header.unlock(&area, b"fifth").unwrap().key, first.key);
    assert_eq!(header.encode(), area[..Header::LEN]);
}

#[test]
fn what_qemu_img_info_says_is_what_is_parsed() {
    let image = Image::by_qemu_with(0);
    image.amend("encrypt.state=active,encrypt.new-secret=new,encrypt.keyslot=2,encrypt.iter-time=20", "second");
    let said = succeed("qemu-img", &["info", "-f", "qcow2", image.text()]);
    let said: Vec<&str> = said.lines().map(str::trim).collect();
    let (_, header, _) = image.area();
    let mut expected = vec![
        format!("uuid: {}", header.uuid()),
        format!("payload offset: {}", header.payload_offset()),
        format!("master key iters: {}", header.digest_iterations()),
    ];
    for slot in header.slots() {
        expected.push(format!("key offset: {}", slot.key_offset));
        if slot.active {
            expected.extend([format!("iters: {}", slot.iterations), format!("stripes: {}", slot.stripes)]);
        }
    }
    for line in expected {
        assert!(said.contains(&&*line), "{line} is not in {said:#?}");
    }
}

#[test]
fn sector_numbers_past_2_tib_are_cut_by_plain_and_kept_by_plain64() {
    const AT: u64 = 2 << 40;
    for iv in [Iv::Plain, Iv::Plain64] {
        let params = params(spec(Mode::Xts, Aes::Aes256, iv), Hash::Sha256);
        let created = params.create(SECRET.as_bytes(), &entropy(params.entropy_len())).unwrap();
        let image = Image::new(Kind::Bare, SECRET, &created.area);
        // A bare volume counts sectors from where its payload starts. Sparse: the disk is never filled.
        let (payload, file) = (created.header.payload_offset(), image.file());
        file.set_len(payload + AT + (1 << 20)).unwrap();
        image.io(&["write -P 71 2T 8k"]);
        let mut data = vec![0; 8 << 10];
        file.read_exact_at(&mut data, payload + AT).unwrap();
        created.key.cipher().unwrap().decrypt(AT / SECTOR as u64, &mut data).unwrap();
        assert!(data.iter().all(|byte| *byte == 71), "{iv:?}");
    }
}
