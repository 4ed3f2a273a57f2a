//! Whole clusters of Raft logs inside one process.

mod common;

use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{Cluster, Fault, commands, eventually, options};
use sheepdog_log::{ClusterLog, LogStatus, MAX_COMMAND, OpenError, Options, ProposeError};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_node_is_a_working_cluster_and_stays_one() {
    let mut cluster = Cluster::new(options()).await;
    cluster.propose(1, "a").await;
    let status = cluster.node(1).status();
    assert_eq!(status.leader, Some(1));
    assert_eq!(status.voters, [1].into());
    assert!(cluster.log(1).is_initialized());
    cluster.stop(1).await;
    cluster.start(1).await;
    cluster.propose(1, "b").await;
    assert_eq!(cluster.node(1).commands(), ["a", "b"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bootstrapping_again_keeps_the_cluster() {
    let mut cluster = Cluster::new(options()).await;
    cluster.propose(1, "a").await;
    cluster.stop(1).await;
    cluster.start_as(1, true).await.unwrap();
    cluster.propose(1, "b").await;
    assert_eq!(cluster.node(1).commands(), ["a", "b"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_join_through_any_member_and_become_voters() {
    let mut cluster = Cluster::new(options()).await;
    cluster.propose(1, "command 0").await;
    cluster.join(2, 1).await;
    cluster.until(2, "votes", |status| status.voters == [1, 2].into()).await;
    cluster.join(3, 2).await;
    for id in 1..=3 {
        let all = |status: &LogStatus| status.voters == [1, 2, 3].into();
        let status = cluster.until(id, "knows three voters", all).await;
        assert_eq!(status.addresses[&3], "node3");
    }
    for (via, command) in [(2, "command 1"), (3, "command 2"), (1, "command 3")] {
        cluster.propose(via, command).await;
    }
    for id in 1..=3 {
        cluster.until_applied(id, &commands(0..4)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_joined_nothing_has_no_leader() {
    let mut cluster =
        Cluster::new(Options { propose_timeout: Duration::from_millis(300), ..options() }).await;
    cluster.create(2);
    cluster.start(2).await;
    assert!(!cluster.log(2).is_initialized());
    let error = cluster.log(2).propose(b"x".into()).await.unwrap_err();
    assert!(matches!(error, ProposeError::Unavailable(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adding_a_member_twice_is_harmless() {
    let cluster = Cluster::of(3, options()).await;
    let before = cluster.node(1).status().voters;
    cluster.log(2).add_member(3, "node3".into()).await.unwrap();
    assert_eq!(cluster.node(1).status().voters, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_others_go_on_when_the_leader_dies() {
    let mut cluster = Cluster::of(3, options()).await;
    cluster.propose(2, "command 0").await;
    let term = cluster.node(1).status().term;
    cluster.stop(1).await;
    // From the death on: the proposal itself waits for the new leader.
    cluster.propose(3, "command 1").await;
    let leader = cluster.leader_among(&[2, 3]).await;
    assert!(cluster.node(leader).status().term > term);
    eventually("it may decide", || cluster.log(leader).is_confirmed_leader()).await;
    cluster.start(1).await;
    for id in 1..=3 {
        cluster.until_applied(id, &commands(0..2)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_known_to_be_dead_is_followed_at_once() {
    // By itself nobody would stand for election before the test gives up.
    let timeout = (Duration::from_secs(500), Duration::from_secs(1000));
    let mut cluster = Cluster::of(3, Options { election_timeout: timeout, ..options() }).await;
    cluster.propose(3, "command 0").await;
    // Nobody falls for the name of another.
    cluster.log(2).leader_died(3).await;
    assert_eq!(cluster.node(2).status().leader, Some(1));
    cluster.stop(1).await;
    for id in [3, 2] {
        cluster.log(id).leader_died(1).await;
    }
    cluster.until(2, "leads", |status| status.is_leader).await;
    cluster.propose(3, "command 1").await;
    eventually("it may decide", || cluster.log(2).is_confirmed_leader()).await;
    cluster.until_applied(3, &commands(0..2)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_stops_hands_over() {
    // By itself nobody would stand for election before the test gives up.
    let timeout = (Duration::from_secs(500), Duration::from_secs(1000));
    let mut cluster = Cluster::of(3, Options { election_timeout: timeout, ..options() }).await;
    for round in 0..3 {
        let leader = cluster.leader_among(&[1, 2, 3]).await;
        let others: Vec<u64> = (1..=3).filter(|id| *id != leader).collect();
        cluster.propose(others[0], &format!("command {}", 2 * round)).await;
        cluster.log(leader).hand_over().await;
        assert!(others.contains(&cluster.node(leader).status().leader.unwrap()));
        cluster.stop(leader).await;
        cluster.propose(others[1], &format!("command {}", 2 * round + 1)).await;
        let heir = cluster.leader_among(&others).await;
        eventually("it may decide", || cluster.log(heir).is_confirmed_leader()).await;
        cluster.start(leader).await;
        for id in 1..=3 {
            cluster.until_applied(id, &commands(0..2 * round + 2)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_was_killed_leads_again_as_soon_as_it_is_back() {
    // By itself nobody would stand for election before the test gives up.
    let timeout = (Duration::from_secs(500), Duration::from_secs(1000));
    let mut cluster = Cluster::of(3, Options { election_timeout: timeout, ..options() }).await;
    cluster.propose(3, "command 0").await;
    for round in 1..4 {
        cluster.stop(1).await;
        cluster.start(1).await;
        cluster.propose(2, &format!("command {round}")).await;
        eventually("it may decide", || cluster.log(1).is_confirmed_leader()).await;
    }
    for id in 1..=3 {
        cluster.until_applied(id, &commands(0..4)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_lead_or_is_alone_hands_nothing_over() {
    let timeout = (Duration::from_secs(500), Duration::from_secs(1000));
    let options = Options { election_timeout: timeout, ..options() };
    let alone = Cluster::new(options.clone()).await;
    alone.log(1).hand_over().await;
    alone.propose(1, "command 0").await;
    let cluster = Cluster::of(2, options).await;
    cluster.log(2).hand_over().await;
    assert_eq!(cluster.node(2).status().leader, Some(1));
    cluster.propose(2, "command 0").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_leader_does_not_allow_never_enters_the_log() {
    let cluster = Cluster::of(2, options()).await;
    for via in [1, 2] {
        let error = cluster.log(via).propose(b"forbidden".into()).await.unwrap_err();
        assert_eq!(error, ProposeError::Rejected("forbidden here".into()));
    }
    cluster.propose(2, "command 0").await;
    for id in [1, 2] {
        cluster.until_applied(id, &commands(0..1)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_understand_an_entry_stops_and_goes_on_after_an_upgrade() {
    let mut cluster = Cluster::of(3, options()).await;
    let old = [2, 3].into_iter().find(|id| !cluster.node(*id).status().is_leader).unwrap();
    cluster.node(old).journal.is_old.store(true, Ordering::Relaxed);
    cluster.propose(1, "command 0").await;
    cluster.propose(1, "future").await;
    cluster.propose(1, "command 1").await;
    let status = cluster.until(old, "stops", |status| status.failure.is_some()).await;
    assert!(status.failure.as_deref().unwrap_or_default().contains("not understood"), "{status:?}");
    assert_eq!(cluster.node(old).commands(), ["command 0"], "it went on without an entry");
    cluster.stop(old).await;
    cluster.start(old).await;
    let all = ["command 0", "future", "command 1"].map(str::to_owned);
    for id in 1..=3 {
        cluster.until_applied(id, &all).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_in_any_order_keeps_what_was_committed() {
    let mut cluster = Cluster::of(3, options()).await;
    let orders = [[1, 2, 3], [3, 1, 2], [2, 3, 1]];
    let mut count = 0;
    for (round, order) in orders.into_iter().enumerate() {
        for _ in 0..5 {
            let via = u64::from(count % 3 + 1);
            cluster.propose(via, &format!("command {count}")).await;
            count += 1;
        }
        for id in order {
            cluster.stop(id).await;
        }
        for id in orders[(round + 1) % 3] {
            cluster.start(id).await;
        }
        for id in 1..=3 {
            cluster.until_applied(id, &commands(0..count)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minority_commits_nothing_and_says_so() {
    let cluster =
        Cluster::of(3, Options { propose_timeout: Duration::from_secs(5), ..options() }).await;
    for fault in [Fault::Unreachable, Fault::Lost] {
        let leader = cluster.leader_among(&[1, 2, 3]).await;
        cluster.isolate(&[leader], Some(fault));
        // At once: the leader still believes in itself, and appends what will never be committed.
        let error = cluster.log(leader).propose(b"lost".into()).await;
        let error = error.unwrap_err();
        assert!(matches!(error, ProposeError::Unknown(_)), "{error}");
        // Later: it knows better, and nothing is appended any more.
        let error = cluster.log(leader).propose(b"lost".into()).await;
        let error = error.unwrap_err();
        match fault {
            Fault::Unreachable => {
                assert!(matches!(error, ProposeError::Unavailable(_)), "{error}");
            }
            // Whether a request that vanished was handled, nobody can say.
            _ => assert!(
                matches!(error, ProposeError::Unavailable(_) | ProposeError::Unknown(_)),
                "{error}"
            ),
        }
        assert!(!cluster.log(leader).is_confirmed_leader());
        let others: Vec<u64> = (1..=3).filter(|id| *id != leader).collect();
        cluster.leader_among(&others).await;
        cluster.isolate(&[leader], None);
        let healed = cluster.node(others[0]).status().leader;
        cluster.until(leader, "follows", |status| status.leader == healed).await;
        // Node 1 is asked for the leader in the next round.
        cluster.until(1, "follows", |status| status.leader == healed).await;
    }
    cluster.propose(1, "kept").await;
    for id in 1..=3 {
        cluster.until_applied(id, &["kept".into()]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_was_cut_off_does_not_depose_the_leader() {
    let cluster = Cluster::of(3, options()).await;
    let term = cluster.node(1).status().term;
    cluster.isolate(&[3], Some(Fault::Unreachable));
    // It asks both others for their votes, more than once, and could raise its term each time.
    let before = cluster.net.calls(3);
    eventually("it stands for election", || cluster.net.calls(3) >= before + 6).await;
    cluster.propose(1, "command 0").await;
    cluster.isolate(&[3], None);
    cluster.until_applied(3, &commands(0..1)).await;
    let status = cluster.node(1).status();
    assert_eq!((status.term, status.leader), (term, Some(1)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_response_leaves_it_unknown_and_is_not_tried_again() {
    let cluster = Cluster::of(3, options()).await;
    let leader = cluster.leader_among(&[1, 2, 3]).await;
    let other = leader % 3 + 1;
    cluster.until(other, "follows", |status| status.leader == Some(leader)).await;
    cluster.net.set_fault(other, leader, Some(Fault::NoResponse));
    let error = cluster.log(other).propose(b"once".into()).await.unwrap_err();
    assert!(matches!(error, ProposeError::Unknown(_)), "{error}");
    cluster.net.set_fault(other, leader, None);
    cluster.propose(other, "twice").await;
    cluster.until_applied(other, &["once".into(), "twice".into()]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proposal_keeps_trying_until_the_leader_can_be_reached() {
    let cluster = Cluster::of(3, options()).await;
    cluster.net.set_fault(2, 1, Some(Fault::Unreachable));
    let before = cluster.net.calls(2);
    let log = cluster.log(2).clone();
    let proposed = tokio::spawn(async move { log.propose(b"a".into()).await });
    // A follower makes no other calls: it asks the leader, and the third node.
    eventually("it tries again", || cluster.net.calls(2) >= before + 4).await;
    cluster.net.set_fault(2, 1, None);
    proposed.await.unwrap().unwrap();
    cluster.until_applied(2, &["a".into()]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_voters_that_was_interrupted_is_finished() {
    let mut cluster = Cluster::of(2, options()).await;
    cluster.join(3, 2).await;
    let leader = cluster.leader_among(&[1, 2]).await;
    let changing = |status: &LogStatus| status.is_changing || status.voters.contains(&3);
    cluster.until(leader, "changes the voters", changing).await;
    cluster.stop(leader).await;
    cluster.start(leader).await;
    for id in 1..=3 {
        let done = |status: &LogStatus| status.voters == [1, 2, 3].into() && !status.is_changing;
        cluster.until(id, "finished the change", done).await;
    }
    cluster.propose(3, "command 0").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_beyond_the_wanted_voters_stays_a_learner_and_has_the_log() {
    let mut cluster = Cluster::of(3, Options { max_voters: 2, ..options() }).await;
    cluster.propose(3, "command 0").await;
    let status = cluster.node(3).status();
    assert_eq!(status.voters, [1, 2].into());
    assert_eq!(status.learners, [3].into());
    cluster.until_applied(3, &commands(0..1)).await;
    cluster.stop(3).await;
    cluster.propose(2, "command 1").await;
    cluster.start(3).await;
    cluster.until_applied(3, &commands(0..2)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_voter_is_replaced_by_a_learner() {
    let mut cluster = Cluster::of(4, Options { max_voters: 3, ..options() }).await;
    let spare = *cluster.node(1).status().learners.first().unwrap();
    let dead = if spare == 2 { 3 } else { 2 };
    cluster.stop(dead).await;
    let up: Vec<u64> = (1..=4).filter(|id| *id != dead).collect();
    for id in &up {
        cluster.log(*id).reconcile_members(&up, &[]);
    }
    let replaced = |status: &LogStatus| {
        status.voters == up.iter().copied().collect() && status.learners == [dead].into()
    };
    cluster.until(1, "replaced the dead", replaced).await;
    // The old voters would have no quorum without their dead one; the new ones have.
    cluster.propose(1, "command 0").await;
    let second = if spare == 4 { 3 } else { 4 };
    let second = if second == dead { spare } else { second };
    cluster.stop(second).await;
    cluster.propose(1, "command 1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_leader_is_replaced_as_voter_by_the_next_leader() {
    let mut cluster = Cluster::of(4, Options { max_voters: 3, ..options() }).await;
    let leader = cluster.node(1).status().leader.unwrap();
    cluster.stop(leader).await;
    let up: Vec<u64> = (1..=4).filter(|id| *id != leader).collect();
    for id in &up {
        cluster.log(*id).reconcile_members(&up, &[]);
    }
    for id in &up {
        let replaced = |status: &LogStatus| !status.voters.contains(&leader);
        cluster.until(*id, "replaced the dead", replaced).await;
    }
    cluster.propose(up[0], "command 0").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_that_is_gone_loses_its_vote_until_it_is_back() {
    let mut cluster = Cluster::of(4, Options { max_voters: 5, ..options() }).await;
    cluster.until(1, "all vote", |status| status.voters.len() == 4).await;
    let leader = cluster.node(1).status().leader.unwrap();
    let mut others: Vec<u64> = (1..=4).filter(|id| *id != leader).collect();
    let (gone, dies) = (others.remove(0), others.remove(0));
    cluster.stop(gone).await;
    let up: Vec<u64> = (1..=4).filter(|id| *id != gone).collect();
    for id in &up {
        cluster.log(*id).reconcile_members(&up, &[gone]);
    }
    let dropped = |status: &LogStatus| status.learners == [gone].into();
    cluster.until(leader, "dropped the vote", dropped).await;
    // Two of four would be no quorum.
    cluster.stop(dies).await;
    cluster.propose(leader, "command 0").await;
    for id in [gone, dies] {
        cluster.start(id).await;
    }
    for id in 1..=4 {
        cluster.log(id).reconcile_members(&[1, 2, 3, 4], &[]);
    }
    cluster.until(leader, "it votes again", |status| status.voters.len() == 4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_can_be_removed_even_the_leader() {
    let mut cluster = Cluster::of(3, options()).await;
    cluster.remove(3, 2).await;
    cluster.until(2, "saw 3 go", |status| !status.is_member(3)).await;
    cluster.stop(3).await;
    cluster.remove(3, 1).await;
    let leader = cluster.leader_among(&[1, 2]).await;
    let other = 3 - leader;
    cluster.remove(leader, other).await;
    cluster.until(other, "leads", |status| status.is_leader).await;
    cluster.propose(other, "command 0").await;
    let error = cluster.log(other).remove_member(other).await.unwrap_err();
    assert!(matches!(error, ProposeError::Rejected(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_can_move_to_another_address() {
    let mut cluster = Cluster::of(3, options()).await;
    cluster.stop(3).await;
    cluster.nodes.get_mut(&3).unwrap().addr = "elsewhere".into();
    cluster.start(3).await;
    // It is the moved node that knows; the leader cannot reach it yet.
    let log = cluster.log(3);
    log.update_address(3, "elsewhere".into()).await.unwrap();
    cluster.propose(1, "command 0").await;
    cluster.until_applied(3, &commands(0..1)).await;
    let error = log.update_address(9, "x".into()).await.unwrap_err();
    assert!(matches!(error, ProposeError::Rejected(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_now_belongs_to_another_node_is_not_mistaken() {
    // As long as what is not to be waited for in vain may take.
    let short = Duration::from_secs(5);
    let mut cluster = Cluster::of(2, Options { propose_timeout: short, ..options() }).await;
    cluster.stop(2).await;
    cluster.create(7);
    cluster.nodes.get_mut(&7).unwrap().addr = "node2".into();
    cluster.start(7).await;
    // With node 7 counted as node 2 there would be a quorum.
    cluster.log(1).propose(b"a".into()).await.unwrap_err();
    assert!(!cluster.log(7).is_initialized());
    cluster.stop(7).await;
    cluster.options = options();
    cluster.start(2).await;
    cluster.propose(2, "b").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_member_catches_up_by_snapshot_when_the_log_was_purged() {
    let mut cluster =
        Cluster::new(Options { snapshot_every: 20, keep_entries: 5, ..options() }).await;
    for i in 0..60 {
        cluster.propose(1, &format!("command {i}")).await;
    }
    cluster.until(1, "has a snapshot", |status| status.snapshot >= 40).await;
    cluster.join(2, 1).await;
    cluster.until_applied(2, &commands(0..60)).await;
    let restored = &cluster.node(2).journal.restored;
    assert!(restored.load(std::sync::atomic::Ordering::Relaxed) > 0);
    // From its own snapshot, and the log behind it, after a restart.
    cluster.until(2, "votes", |status| status.voters.contains(&2)).await;
    cluster.stop(2).await;
    cluster.start(2).await;
    cluster.until_applied(2, &commands(0..60)).await;
    cluster.propose(2, "command 60").await;
    cluster.until_applied(1, &commands(0..61)).await;
    cluster.until_applied(2, &commands(0..61)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_proposals_at_once_from_all_members_are_all_applied_once() {
    let cluster = Cluster::of(3, options()).await;
    let mut tasks = Vec::new();
    for i in 0..300u64 {
        let log = cluster.log(i % 3 + 1).clone();
        tasks.push(tokio::spawn(async move {
            log.propose(format!("command {i:03}").into_bytes()).await
        }));
    }
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    let mut expected: Vec<String> = (0..300).map(|i| format!("command {i:03}")).collect();
    let done = |_: &LogStatus| cluster.node(2).commands().len() >= 300;
    cluster.until(2, "applied all", done).await;
    let mut applied = cluster.node(2).commands();
    applied.sort();
    expected.sort();
    assert_eq!(applied, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_commands_are_carried_and_larger_ones_rejected() {
    let mut cluster = Cluster::of(2, options()).await;
    let large = "x".repeat(MAX_COMMAND);
    cluster.stop(2).await;
    cluster.start(2).await;
    for _ in 0..6 {
        cluster.propose(2, &large).await;
    }
    cluster.until_applied(2, &vec![large.clone(); 6]).await;
    let error = cluster.log(2).propose(vec![0; MAX_COMMAND + 1]).await;
    let error = error.unwrap_err();
    assert!(matches!(error, ProposeError::Rejected(_)), "{error}");
    // Many of them have to be sent in several pieces.
    cluster.join(3, 2).await;
    cluster.until_applied(3, &vec![large; 6]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_is_answered_with_an_error() {
    let cluster = Cluster::new(options()).await;
    let mut state = std::env::var("SEED").map_or(0x5eed_u64, |seed| seed.parse().unwrap());
    println!("SEED={state}");
    for round in 0..2000 {
        let mut frame = Vec::new();
        for _ in 0..round % 64 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            frame.push((state >> 56) as u8);
        }
        if round % 2 == 0 {
            // Past the first check.
            frame.splice(0..0, [1, 9, 1]);
        }
        // Random bytes may happen to be a request; they must only do no harm.
        let _ = cluster.log(1).handle_rpc(&frame).await;
    }
    cluster.log(1).handle_rpc(b"").await.unwrap_err();
    cluster.log(1).handle_rpc(b"GET / HTTP/1.1").await.unwrap_err();
    assert_eq!(cluster.node(1).status().failure, None);
    cluster.propose(1, "still here").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_nodes_directory_is_locked() {
    let mut cluster = Cluster::new(options()).await;
    let error = cluster.start_as(1, false).await.unwrap_err();
    assert!(matches!(error, OpenError::Locked { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_after_shutdown_fail_at_once() {
    let cluster = Cluster::new(options()).await;
    let log = cluster.log(1);
    log.shutdown().await;
    let error = log.propose(b"x".into()).await.unwrap_err();
    assert!(matches!(error, ProposeError::NotCommitted(_)), "{error}");
    assert!(!log.is_confirmed_leader());
    log.shutdown().await;
}
