//! sheepdog-qemu-tests.
