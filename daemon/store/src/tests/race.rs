//! Moments that two threads must hit together, made to happen.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::oracle::{Model, Op, key, version};
use super::sim::SimMedium;
use super::support::{check_equal, new_sim, open_sim};

fn write(seq: u64) -> Op {
    Op::Write { key: key(1, 0, 0), version: version(1, seq), first: 0, tags: vec![seq] }
}

/// A checkpoint commits a layer between the moment at which a write looks up its slab and the one
/// at which it is published: the write must not bring back the slab's older record.
#[test]
fn i6_a_commit_in_the_midst_of_a_write_is_not_forgotten_by_it() {
    let medium = SimMedium::default();
    let engine = Arc::new(new_sim(&medium));
    let mut model = Model::new();
    let mut apply = |op: &Op| {
        op.apply_to_store(&engine, &model).unwrap();
        op.apply_to_model(&mut model);
    };
    apply(&write(1));
    let (at_mark, wait_for_mark) = mpsc::channel();
    let (appending, wait_for_append) = mpsc::channel();
    let wait_for_append = std::sync::Mutex::new(wait_for_append);
    let (writing, reached) = (Arc::new(AtomicBool::new(false)), AtomicBool::new(false));
    let (watched, is_writing) = (Arc::clone(&engine), Arc::clone(&writing));
    let committed = move || {
        watched.table.shard_of(key(1, 0, 0).object).get(key(1, 0, 0)).unwrap().base.is_some()
    };
    medium.set_hook(Some(Arc::new(move |file: &str| {
        if file == "superblock" && !reached.swap(true, SeqCst) {
            at_mark.send(()).unwrap();
            let append = wait_for_append.lock().unwrap();
            append.recv_timeout(Duration::from_secs(60)).expect("the write gets to the log");
        } else if file.starts_with("log/") && is_writing.swap(false, SeqCst) {
            appending.send(()).unwrap();
            let start = Instant::now();
            while !committed() {
                assert!(start.elapsed() < Duration::from_secs(60), "the checkpoint goes on");
                std::thread::yield_now();
            }
        }
    })));
    std::thread::scope(|scope| {
        let checkpoint = scope.spawn(|| engine.checkpoint());
        wait_for_mark
            .recv_timeout(Duration::from_secs(60))
            .expect("the checkpoint gets to its mark");
        writing.store(true, SeqCst);
        apply(&write(2));
        checkpoint.join().unwrap().unwrap();
    });
    medium.set_hook(None);
    engine.checkpoint().unwrap();
    check_equal(&engine, &model).unwrap();
    drop(engine);
    check_equal(&open_sim(&medium).unwrap(), &model).unwrap();
}
