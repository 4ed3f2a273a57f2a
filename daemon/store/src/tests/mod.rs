//! Tests that look inside: a medium that loses power, damaged files, full and failing disks.

mod anatomy;
mod crash;
mod damage;
mod enumerate;
mod full;
mod later;
mod model;
mod offline;
mod oracle;
mod patch;
mod race;
mod scrub;
mod sim;
mod support;
