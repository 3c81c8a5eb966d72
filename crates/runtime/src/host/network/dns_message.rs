//! Questions and answers of the domain name system, as bytes from the wire. All of them are hostile.
//!
//! Nothing is passed on as it came: questions and answers are read, and what is sent is written anew.

use std::net::Ipv4Addr;
use std::time::Duration;

use domain::base::iana::{Class, Opcode, Rcode, Rtype};
use domain::base::message_builder::AnswerBuilder;
use domain::base::{Message, MessageBuilder, ParsedName, StaticCompressor, Ttl};
use domain::rdata::{A, AllRecordData};

use super::egress_policy::TTL_MAX;

/// What fits into a packet on every path.
pub(super) const UDP_BYTES_MAX: usize = 1_232;
/// What a program takes that does not say how much it takes.
const UDP_BYTES_DEFAULT: usize = 512;
const HEADER: usize = 12;

/// What a sandbox sent.
pub(super) enum Received {
    Question(Question),
    /// It cannot be dealt with; this is said to it.
    Refused(Vec<u8>),
    /// Not even that.
    Nothing,
}

pub(super) struct Question {
    message: Message<Vec<u8>>,
    /// Lower case, without a dot at the end.
    pub name: String,
    rtype: Rtype,
    /// Bytes of the longest answer without a connection, and whether the program said so.
    udp_bytes: usize,
    extended: bool,
}

pub(super) fn read(bytes: &[u8]) -> Received {
    let Ok(message) = Message::from_octets(bytes.to_vec()) else { return Received::Nothing };
    // Answers to answers would go round for ever.
    if message.header().qr() {
        return Received::Nothing;
    }
    if message.header().opcode() != Opcode::QUERY {
        return Received::Refused(header_only(&message, Rcode::NOTIMP));
    }
    let Ok(question) = message.sole_question() else {
        return Received::Refused(header_only(&message, Rcode::FORMERR));
    };
    let (name, rtype) = (question.qname().to_string().to_ascii_lowercase(), question.qtype());
    // From 128 on are types that stand for many, and those that change something.
    let is_plain =
        question.qclass() == Class::IN && (rtype.to_int() < 128 || rtype == Rtype::CAA) && rtype != Rtype::OPT;
    if !is_plain {
        return Received::Refused(header_only(&message, Rcode::REFUSED));
    }
    let said = message.opt().map(|opt| usize::from(opt.udp_payload_size()));
    let udp_bytes = said.unwrap_or(0).clamp(UDP_BYTES_DEFAULT, UDP_BYTES_MAX);
    Received::Question(Question { message, name, rtype, udp_bytes, extended: said.is_some() })
}

fn header_only(message: &Message<Vec<u8>>, rcode: Rcode) -> Vec<u8> {
    let mut answer = MessageBuilder::new_vec();
    let header = answer.header_mut();
    header.set_id(message.header().id());
    header.set_qr(true);
    header.set_opcode(message.header().opcode());
    header.set_rcode(rcode);
    answer.finish()
}

impl Question {
    /// Whether the answer is that there is nothing, whoever is asked: sandboxes have no IPv6, and addresses that come as
    /// hints of services would not be reachable.
    pub fn is_of_no_use(&self) -> bool {
        matches!(self.rtype, Rtype::AAAA | Rtype::HTTPS | Rtype::SVCB)
    }

    pub fn asks_for_addresses(&self) -> bool {
        self.rtype == Rtype::A
    }

    /// The same question under our own number; `None` when it cannot be written, which no valid one does.
    pub fn for_upstream(&self, id: u16) -> Option<Vec<u8>> {
        let mut builder = MessageBuilder::new_vec();
        builder.header_mut().set_id(id);
        builder.header_mut().set_rd(true);
        let mut builder = builder.question();
        builder.push(self.message.sole_question().ok()?).ok()?;
        let mut builder = builder.additional();
        builder
            .opt(|opt| {
                opt.set_udp_payload_size(UDP_BYTES_MAX as u16);
                Ok(())
            })
            .ok()?;
        Some(builder.finish())
    }

    /// An answer without records.
    pub fn answer(&self, rcode: Rcode) -> Vec<u8> {
        self.finish(self.start(rcode), false)
    }

    /// What the name server said, as far as it belongs to the question. Over `udp`, when it is too long, only that it is.
    pub fn answer_with(&self, answer: &Answer, udp: bool) -> Vec<u8> {
        let mut builder = self.start(answer.message.header().rcode());
        builder.set_push_limit(if udp { self.udp_bytes - OPT_BYTES } else { usize::from(u16::MAX) - OPT_BYTES });
        let complete = self.push_records(&mut builder, answer).is_some();
        if complete {
            return self.finish(builder, false);
        }
        self.finish(self.start(Rcode::NOERROR), true)
    }

    fn push_records(&self, builder: &mut AnswerBuilder<StaticCompressor<Vec<u8>>>, answer: &Answer) -> Option<()> {
        let canonical = answer.message.canonical_name()?;
        let records = answer.message.answer().ok()?.into_records::<AllRecordData<_, ParsedName<_>>>();
        for record in records {
            let mut record = record.ok()?;
            let on_the_way = record.rtype() == Rtype::CNAME;
            if on_the_way || (record.rtype() == self.rtype && *record.owner() == canonical) {
                record.set_ttl(record.ttl().min(Ttl::from_secs(TTL_MAX.as_secs() as u32)));
                builder.push(record).ok()?;
            }
        }
        Some(())
    }

    fn start(&self, rcode: Rcode) -> AnswerBuilder<StaticCompressor<Vec<u8>>> {
        let mut builder = MessageBuilder::from_target(StaticCompressor::new(Vec::new()))
            .expect("a vector takes the header")
            .start_error(&self.message, rcode);
        builder.header_mut().set_ra(true);
        builder
    }

    fn finish(&self, mut builder: AnswerBuilder<StaticCompressor<Vec<u8>>>, truncated: bool) -> Vec<u8> {
        builder.header_mut().set_tc(truncated);
        builder.clear_push_limit();
        let mut builder = builder.additional();
        if self.extended {
            // Without it the answer is as good.
            let _ = builder.opt(|opt| {
                opt.set_udp_payload_size(UDP_BYTES_MAX as u16);
                Ok(())
            });
        }
        builder.finish().into_target()
    }
}

/// Bytes of the record that says how long answers may be.
const OPT_BYTES: usize = 11;

/// What a name server answered to one of our questions.
pub(super) struct Answer {
    message: Message<Vec<u8>>,
}

impl Answer {
    /// `None` unless these bytes answer what was sent.
    pub fn read(bytes: &[u8], sent: &[u8]) -> Option<Self> {
        if bytes.len() < HEADER {
            return None;
        }
        let message = Message::from_octets(bytes.to_vec()).ok()?;
        let sent = Message::from_octets(sent).ok()?;
        // A server that cannot read the question does not repeat it, and says nothing of use.
        message.is_answer(&sent).then_some(Self { message })
    }

    pub fn is_truncated(&self) -> bool {
        self.message.header().tc()
    }

    /// Whether it is one of the two that say something of the name.
    pub fn is_of_the_name(&self) -> bool {
        matches!(self.message.header().rcode(), Rcode::NOERROR | Rcode::NXDOMAIN)
    }

    /// The addresses of the name, or of the name that its aliases lead to; `None` when the answer is broken.
    pub fn addresses(&self) -> Option<Vec<(Ipv4Addr, Duration)>> {
        let canonical = self.message.canonical_name()?;
        let mut found = Vec::new();
        for record in self.message.answer().ok()?.limit_to_in::<A>() {
            let record = record.ok()?;
            if *record.owner() == canonical {
                found.push((record.data().addr(), record.ttl().into_duration()));
            }
        }
        Some(found)
    }
}

#[cfg(test)]
mod tests {
    use domain::base::{Name, Record};
    use domain::rdata::Cname;
    use proptest::prelude::*;

    use super::*;

    type Built = AnswerBuilder<Vec<u8>>;

    fn name(text: &str) -> Name<Vec<u8>> {
        text.parse().expect("a name")
    }

    fn question(text: &str, rtype: Rtype) -> Vec<u8> {
        let mut builder = MessageBuilder::new_vec();
        builder.header_mut().set_id(7);
        builder.header_mut().set_rd(true);
        let mut builder = builder.question();
        builder.push((name(text), rtype)).expect("room");
        builder.finish()
    }

    fn read_question(bytes: &[u8]) -> Question {
        match read(bytes) {
            Received::Question(question) => question,
            _ => panic!("no question"),
        }
    }

    fn rcode(bytes: &[u8]) -> Rcode {
        Message::from_octets(bytes).expect("a message").header().rcode()
    }

    fn answer(sent: &[u8], fill: impl FnOnce(&mut Built)) -> Vec<u8> {
        let sent = Message::from_octets(sent).expect("a message");
        let mut builder = MessageBuilder::new_vec().start_answer(&sent, Rcode::NOERROR).expect("room");
        fill(&mut builder);
        builder.finish()
    }

    fn address(builder: &mut Built, owner: &str, address: [u8; 4], ttl: u32) {
        builder.push((name(owner), ttl, A::new(address.into()))).expect("room");
    }

    fn alias(builder: &mut Built, owner: &str, target: &str) {
        let record: Record<_, _> = (name(owner), 60, Cname::new(name(target))).into();
        builder.push(record).expect("room");
    }

    #[test]
    fn names_are_read_in_one_form() {
        let asked = read_question(&question("WwW.Example.COM.", Rtype::A));
        assert_eq!(asked.name, "www.example.com");
        // A dot within a label is no dot between labels.
        let mut bytes = question("wwwxexample.com", Rtype::A);
        bytes[HEADER + 4] = b'.';
        assert_eq!(read_question(&bytes).name, "www\\.example.com");
        assert_eq!(read_question(&question("xn--bcher-kva.example", Rtype::A)).name, "xn--bcher-kva.example");
    }

    #[test]
    fn what_is_no_plain_question_is_refused_shortly_or_ignored() {
        let good = question("a.example", Rtype::A);
        let refusal = |bytes: &[u8]| match read(bytes) {
            Received::Refused(answer) => {
                assert_eq!(answer.len(), HEADER);
                Some(rcode(&answer))
            }
            _ => None,
        };
        for rtype in [Rtype::ANY, Rtype::AXFR, Rtype::IXFR, Rtype::TSIG, Rtype::OPT] {
            assert_eq!(refusal(&question("a.example", rtype)), Some(Rcode::REFUSED), "{rtype}");
        }
        let mut update = good.clone();
        update[2] |= 5 << 3;
        assert_eq!(refusal(&update), Some(Rcode::NOTIMP));
        let mut many = good.clone();
        many[4..6].copy_from_slice(&[0xff, 0xff]);
        assert_eq!(refusal(&many), Some(Rcode::FORMERR));
        let mut chaos = good.clone();
        let last = chaos.len() - 1;
        chaos[last] = 3;
        assert_eq!(refusal(&chaos), Some(Rcode::REFUSED));
        // A name that points to itself.
        let mut looped = good[..HEADER].to_vec();
        looped.extend([0xc0, 12, 0, 1, 0, 1]);
        assert_eq!(refusal(&looped), Some(Rcode::FORMERR));
        let mut of_an_answer = good.clone();
        of_an_answer[2] |= 0x80;
        assert!(matches!(read(&of_an_answer), Received::Nothing));
        for length in 0..HEADER {
            assert!(matches!(read(&good[..length]), Received::Nothing), "{length}");
        }
        for length in HEADER..good.len() {
            assert_eq!(refusal(&good[..length]), Some(Rcode::FORMERR), "{length}");
        }
    }

    #[test]
    fn only_answers_to_the_question_are_taken() {
        let asked = read_question(&question("a.example", Rtype::A));
        let sent = asked.for_upstream(99).expect("a question");
        assert!(Answer::read(&answer(&sent, |_| ()), &sent).is_some());
        let other_id = asked.for_upstream(98).expect("a question");
        assert!(Answer::read(&answer(&other_id, |_| ()), &sent).is_none());
        let other = read_question(&question("b.example", Rtype::A)).for_upstream(99).expect("a question");
        assert!(Answer::read(&answer(&other, |_| ()), &sent).is_none());
        assert!(Answer::read(&sent, &sent).is_none(), "a question is no answer");
        assert!(Answer::read(&[], &sent).is_none());
    }

    #[test]
    fn aliases_are_followed_and_strangers_left_out() {
        let asked = read_question(&question("a.example", Rtype::A));
        let sent = asked.for_upstream(1).expect("a question");
        let bytes = answer(&sent, |builder| {
            alias(builder, "A.Example", "b.cdn.example");
            alias(builder, "b.cdn.example", "c.cdn.example");
            address(builder, "c.cdn.example", [1, 2, 3, 4], 90_000);
            address(builder, "stranger.example", [6, 6, 6, 6], 60);
            address(builder, "a.example", [7, 7, 7, 7], 60);
        });
        let found = Answer::read(&bytes, &sent).expect("an answer");
        let addresses = found.addresses().expect("it is whole");
        assert_eq!(addresses, [(Ipv4Addr::new(1, 2, 3, 4), Duration::from_secs(90_000))]);
        let told = asked.answer_with(&found, true);
        let message = Message::from_octets(told.as_slice()).expect("a message");
        assert_eq!((message.header().id(), message.header_counts().ancount()), (7, 3));
        let last =
            message.answer().expect("it is whole").limit_to_in::<A>().next().expect("an address").expect("it is whole");
        assert_eq!((last.data().addr(), last.ttl().as_secs()), (Ipv4Addr::new(1, 2, 3, 4), 3_600));
    }

    #[test]
    fn aliases_that_go_round_are_no_answer() {
        let asked = read_question(&question("a.example", Rtype::A));
        let sent = asked.for_upstream(1).expect("a question");
        let bytes = answer(&sent, |builder| {
            alias(builder, "a.example", "b.example");
            alias(builder, "b.example", "a.example");
        });
        assert_eq!(Answer::read(&bytes, &sent).expect("an answer").addresses(), None);
    }

    #[test]
    fn what_does_not_fit_is_said_to_be_longer() {
        let asked = read_question(&question("a.example", Rtype::A));
        let sent = asked.for_upstream(1).expect("a question");
        let bytes = answer(&sent, |builder| (0..200).for_each(|n| address(builder, "a.example", [1, 2, 3, n], 60)));
        let found = Answer::read(&bytes, &sent).expect("an answer");
        let short = asked.answer_with(&found, true);
        let message = Message::from_octets(short.as_slice()).expect("a message");
        assert!(short.len() <= UDP_BYTES_DEFAULT && message.header().tc() && message.header_counts().ancount() == 0);
        let whole = asked.answer_with(&found, false);
        let message = Message::from_octets(whole.as_slice()).expect("a message");
        assert_eq!((message.header().tc(), message.header_counts().ancount()), (false, 200));
    }

    #[test]
    fn answers_cut_anywhere_do_no_harm() {
        let asked = read_question(&question("a.example", Rtype::A));
        let sent = asked.for_upstream(1).expect("a question");
        let bytes = answer(&sent, |builder| {
            alias(builder, "a.example", "b.example");
            address(builder, "b.example", [1, 2, 3, 4], 60);
        });
        for length in 0..bytes.len() {
            if let Some(found) = Answer::read(&bytes[..length], &sent) {
                assert_eq!(found.addresses().unwrap_or_default(), [], "{length}");
                let _ = asked.answer_with(&found, true);
            }
        }
    }

    /// Takes bytes through everything that bytes from outside go through.
    fn digest(question: &[u8], reply: &[u8]) {
        let Received::Question(asked) = read(question) else { return };
        assert!(asked.answer(Rcode::REFUSED).len() <= question.len() + HEADER + 255 + OPT_BYTES);
        let Some(sent) = asked.for_upstream(u16::from_be_bytes([reply[0], reply[1]])) else { return };
        if let Some(found) = Answer::read(reply, &sent) {
            let _ = found.addresses();
            assert!(asked.answer_with(&found, true).len() <= UDP_BYTES_MAX);
            let _ = asked.answer_with(&found, false);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_do_harm(
            noise in proptest::collection::vec(any::<u8>(), 2..600),
            places in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        ) {
            let question = question("a.example", Rtype::A);
            let sent = read_question(&question).for_upstream(1).expect("a question");
            let mut reply = answer(&sent, |builder| {
                alias(builder, "a.example", "b.example");
                alias(builder, "b.example", "c.b.example");
                (0..30).for_each(|n| address(builder, "c.b.example", [1, 2, 3, n], 60));
            });
            let mut broken = question.clone();
            for (place, byte) in places {
                // The number and the flag of an answer stay, or it would not be looked at.
                let at = 3 + place.index(reply.len() - 3);
                reply[at] = byte;
                let at = place.index(broken.len());
                broken[at] = byte;
            }
            digest(&question, &reply);
            digest(&broken, &reply);
            digest(&noise, &reply);
            digest(&question, &noise);
        }
    }
}
