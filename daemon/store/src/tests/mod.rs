//! Tests that look inside: a medium that loses power, damaged files, full and failing disks.

mod anatomy;
mod crash;
mod damage;
mod enumerate;
mod full;
mod model;
mod oracle;
mod scrub;
mod sim;
mod support;
