//! What the unit tests share with the tests in `tests/`.

#[path = "../tests/support/disk.rs"]
#[allow(dead_code, reason = "each user needs a part of it")]
pub(crate) mod disk;
#[path = "../tests/support/driver.rs"]
#[allow(dead_code, reason = "each user needs a part of it")]
pub(crate) mod driver;
