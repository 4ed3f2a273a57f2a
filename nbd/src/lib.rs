//! sheepdog-nbd.
