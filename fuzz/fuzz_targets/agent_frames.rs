//! The frame decoder and the messages in frames, on any bytes.
#![no_main]

use bytes::BufMut;
use libfuzzer_sys::fuzz_target;
use nagaya_guest::frame::{Decoder, Kind};
use nagaya_guest::messages::{self, Event, Hello, Input, Outcome, Request};

fuzz_target!(|input: &[u8]| {
    let mut decoder = Decoder::default();
    decoder.buffer().put_slice(input);
    while let Ok(Some(frame)) = decoder.next_frame() {
        assert!(frame.payload.len() <= input.len());
        match frame.kind {
            Kind::Hello => drop(messages::decode::<Hello>(&frame.payload)),
            Kind::Open => drop(messages::decode::<Request>(&frame.payload)),
            Kind::Message => {
                let _ = messages::decode::<Input>(&frame.payload);
                let _ = messages::decode::<Event>(&frame.payload);
            }
            Kind::End => drop(messages::decode::<Outcome>(&frame.payload)),
            Kind::Window => assert!(frame.granted().is_some()),
            Kind::Data | Kind::ErrorData | Kind::Reset | Kind::Goodbye => {}
        }
    }
});
