use super::*;
use serde_json::json as value;

#[test]
fn json_passes_through_what_this_release_does_not_know() {
    let answer = value!({"new": [1, 2.5, null], "size": u64::MAX, "name": "a\u{1b}b", "z": -1});
    let text = json(&answer);
    assert!(text.ends_with("}\n") && !text.ends_with("\n\n"));
    assert!(text.contains("\n  \"size\": 18446744073709551615"), "indented: {text}");
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), answer);
    assert_eq!(json(&Value::Null), "null\n");
}

#[test]
fn unknown_fields_do_not_disturb_people() {
    let answer = value!([{"volume": "v", "protocol": "nbd", "address": "/s", "clients": 2,
                          "state": "serving", "invented": {"later": true}}]);
    assert_eq!(
        human(&Request::ExportList, answer).unwrap(),
        "VOLUME  PROTOCOL  ADDRESS  CLIENTS  STATE\n\
         v       nbd       /s             2  serving\n"
    );
}

#[test]
fn an_answer_of_another_type_is_an_error() {
    for answer in [value!(null), value!({}), value!("ok"), value!([{"volume": 1}])] {
        assert!(human(&Request::ExportList, answer).is_err());
    }
    assert!(human(&Request::ClusterHealth, value!({"status": "odd"})).is_err());
}

#[test]
fn terminals_get_no_control_characters() {
    let answer = value!([{"volume": "a\u{1b}[2Jb", "protocol": "nbd", "address": "/x\ny\u{9b}",
                          "clients": 0, "state": "serving\r"}]);
    let text = human(&Request::ExportList, answer).unwrap();
    assert!(text.contains(r"a\u{1b}[2Jb") && text.contains(r"/x\ny\u{9b}"), "{text}");
    assert_eq!(text.lines().count(), 2);
    assert!(!text.chars().any(|c| c.is_control() && c != '\n'));
    assert_eq!(printable("two\nlines\u{7}, größer"), "two\nlines\\u{7}, größer");
}

#[test]
fn a_node_without_disks_has_a_line() {
    let answer = value!([{"id": "1", "address": "127.0.0.1:7000", "zone": "z", "state": "up",
                          "drained": false, "entered": 1, "cluster_version": 6, "disks": []}]);
    let text = human(&Request::NodeList, answer).unwrap();
    assert!(
        text.ends_with(
            "\n1     127.0.0.1:7000  z     up     -          -     -         -  -     -\n"
        )
    );
}

#[test]
fn an_export_that_does_not_serve_says_why() {
    let answer = |state| {
        let export = value!({"volume": "v", "protocol": "nbd", "address": "/s", "clients": 0,
                             "state": state});
        let request = Request::ExportAdd {
            volume: "v".into(),
            protocol: Protocol::Nbd,
            address: "/s".into(),
            incoming: false,
        };
        human(&request, export).unwrap()
    };
    assert!(answer("waiting for node 3").contains("It does not serve yet: waiting for node 3."));
    assert!(!answer("serving").contains("yet"));
}

#[test]
fn empty_lists_are_sentences() {
    for request in [Request::VolumeList, Request::ExportList] {
        assert!(human(&request, value!([])).unwrap().starts_with("No "));
    }
    let request = Request::ExportRemove { volume: "v".into(), protocol: None, address: None };
    assert!(human(&request, value!([])).unwrap().contains("no such export"));
}
