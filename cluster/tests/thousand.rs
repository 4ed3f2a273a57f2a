//! A cluster of a thousand nodes. Prints what a change of its membership costs each of them;
//! asserts no times.

#![allow(clippy::unwrap_used)] // helpers of tests

mod sim;

use sheepdog_cluster::command::Command;
use sim::rng::Rng;
use sim::topology::{FaultPlan, Topology};
use sim::world::{Options, World};
use std::time::Duration;

const NODES: usize = 1000;
const CHANGES: u64 = 100;

/// Goes on until the epoch has grown.
fn next_epoch(world: &mut World, before: u64) {
    for _ in 0..2000 {
        world.advance(1).unwrap();
        if world.log.state.epoch.0 > before {
            return;
        }
    }
    panic!("no new epoch: {}", world.describe());
}

#[test]
fn a_thousand_nodes_go_through_a_hundred_changes() {
    let topology = Topology { zones: Some(20), ..Topology::plain(NODES) };
    let plan = FaultPlan { delay: 4, ..FaultPlan::default() };
    let mut world = World::new(Options::seed(1), topology, plan, Rng::new(1));
    world.count_traffic = true;
    let volume = world.create_volume(3, 2).unwrap();
    world.guests = true;
    while !world.serving(volume) {
        world.advance(1).unwrap();
    }
    let (costs, commands) = (world.log.costs.len(), world.traffic.commands);
    let mut down = Vec::new();
    for change in 0..CHANGES {
        let epoch = world.log.state.epoch.0;
        match change % 10 {
            4 => {
                world.join();
            }
            9 => {
                let node = world.nodes[NODES - 1 - change as usize].id;
                let on = true;
                world.commit_now(Command::Drain { node, on, force: false, at: world.now });
            }
            0 | 2 | 5 | 7 => {
                let at = 10 + 7 * change as usize;
                world.crash(at);
                down.push(at);
            }
            _ => world.start_node(down.remove(0)),
        }
        if world.log.state.epoch.0 == epoch {
            next_epoch(&mut world, epoch);
        }
    }
    let epochs = world.log.state.epoch.0 - NODES as u64;
    let spent = &world.log.costs[costs..];
    let mean = |moved: bool| {
        let list: Vec<Duration> = spent.iter().filter(|c| c.0 == moved).map(|c| c.1).collect();
        (list.len(), list.iter().sum::<Duration>() / list.len().max(1) as u32)
    };
    let ((same, cheap), (moved, dear)) = (mean(false), mean(true));
    println!("{epochs} epochs, {} revisions", spent.len());
    println!("CPU of each node: {cheap:?} for each of {same} revisions with the same rings,");
    println!("  {dear:?} for each of {moved} with others (placed once for all nodes here)");
    assert!(epochs >= CHANGES);
    world.heal_all();
    world.settle().unwrap();
    // Only now: changes followed each other too fast for anybody to get far with it before.
    let commands = (world.traffic.commands - commands) / CHANGES;
    let comparisons = world.traffic.sync / CHANGES;
    println!("for each change, bytes of the log to each node: {commands}");
    println!("  bytes of comparisons between all nodes together: {comparisons}");
    assert!(comparisons > 0);
    world.read_all();
    world.settle().unwrap();
    world.compare_replicas().unwrap();
}
