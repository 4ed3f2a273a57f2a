//! Tests that look inside: a medium that loses power, damaged files, full and failing disks.

mod anatomy;
mod crash;
mod damage;
mod enumerate;
mod full;
mod model;
mod offline;
mod oracle;
mod sim;
mod support;
