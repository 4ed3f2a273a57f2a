//! sheepdog-vhost.
