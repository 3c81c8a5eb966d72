use std::collections::BTreeSet;

use super::*;

#[test]
fn names_are_unique_and_in_snake_case() {
    let names: BTreeSet<_> = Code::ALL.iter().map(|code| code.name()).collect();
    assert_eq!(names.len(), Code::ALL.len());
    for name in names {
        assert!(name.split('_').all(|word| !word.is_empty()), "{name}");
        assert!(name.chars().all(|letter| letter.is_ascii_lowercase() || letter == '_'), "{name}");
        assert_eq!(Code::from_name(name).map(Code::name), Some(name));
    }
}

#[test]
fn the_code_can_be_read_back_from_the_text() {
    for code in Code::ALL {
        assert_eq!(Code::in_wire_text(&Error::new(*code, "a [b] c").coded_text()), Some(*code));
    }
    for text in ["", "session not found", "session not found [nonsense]", "[internal]", "x [internal] y"] {
        assert_eq!(Code::in_wire_text(text), None, "{text:?}");
    }
}

#[test]
fn every_code_has_a_text_a_remedy_and_an_exit_code_of_a_failure() {
    for code in Code::ALL {
        assert!(!code.text().is_empty() && !code.text().ends_with('.'), "{code:?}");
        assert!(code.remedy().ends_with('.'), "{code:?}");
        assert!((64..=127).contains(&code.exit_code()), "{code:?}");
        assert!((400..=599).contains(&code.http_status()), "{code:?}");
    }
}

#[test]
fn http_statuses_are_those_that_ssh_clients_look_at() {
    // An SSH bridge refuses before its upgrade with these four.
    assert_eq!(Code::InvalidCertificate.http_status(), 401);
    assert_eq!(Code::PermissionDenied.http_status(), 403);
    assert_eq!(Code::SessionNotFound.http_status(), 404);
    assert_eq!(Code::SessionNotRunning.http_status(), 409);
}
