//! What the tests share with each other and with the unit tests.
#![allow(dead_code, reason = "each user needs a part of it")]

pub mod disk;
pub mod driver;
pub mod guest;
