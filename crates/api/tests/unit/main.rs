//! The unit tests of this crate. They are not the library's own test program, because that would compile its 60,000
//! generated lines a second time: the files that have tests are modules here.

#![allow(dead_code)]

#[path = "../../src/error.rs"]
mod error;
#[path = "../../src/ids.rs"]
mod ids;
#[path = "../../src/names.rs"]
mod names;
mod services;
#[path = "../../src/tenki/words.rs"]
mod words;
