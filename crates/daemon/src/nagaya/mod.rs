//! The façade for `nagaya.v1`: what Nagaya offers beyond the contracts of its client families, to the same callers.
//!
//! It translates and decides nothing, as every façade.

mod egress;
mod facade;
mod facts;
mod forks;
mod images;
mod service;
#[rustfmt::skip]
mod services;

pub(crate) use facade::NagayaFacade;
