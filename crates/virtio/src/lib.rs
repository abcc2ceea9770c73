//! virtio device models, free of KVM and of any transport.
