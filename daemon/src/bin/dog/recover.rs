//! `dog cluster recover`: what giving up lost disks would lose, and the giving up.

use crate::cli::Cli;
use crate::failure::Failure;
use crate::{ask, print, render, show};
use serde_json::from_value;
use sheepdog::api::{RecoverPlan, Request};
use std::io::Write;

/// What has to be typed.
const WORDS: &str = "give up";

/// Shows what would be lost, and does it if told to.
pub fn recover(cli: &Cli, targets: Vec<String>, force: bool, yes: bool) -> Result<(), Failure> {
    let request = Request::ClusterRecoverPlan { targets };
    let answer = ask(cli.node, &request)?;
    let plan: RecoverPlan = from_value(answer.clone()).map_err(|error| Failure::Meaningless {
        node: cli.node,
        changes: false,
        error,
    })?;
    show(cli, &request, answer)?;
    if plan.disks.is_empty() {
        return Ok(());
    }
    if !force {
        return if plan.volumes.is_empty() {
            Ok(())
        } else {
            Err(Failure::Refused(
                "data would be lost, see above; nothing was changed. Start the nodes if there is \
                 any way to; --force gives them up"
                    .into(),
            ))
        };
    }
    if !yes && !confirmed() {
        return Err(Failure::Refused("not confirmed; nothing was changed".into()));
    }
    let disks = plan.disks.into_iter().map(|lost| lost.disk).collect();
    let request = Request::ClusterRecover { disks, epoch: plan.epoch };
    ask(cli.node, &request)?;
    if cli.json {
        return Ok(());
    }
    print(&render::given_up(), true)
}

/// Whether the operator types what it takes.
fn confirmed() -> bool {
    let mut out = std::io::stderr();
    let asked = writeln!(out, "\nThere is no way back. Type '{WORDS}' to go on:");
    let mut line = String::new();
    asked.is_ok() && std::io::stdin().read_line(&mut line).is_ok() && line.trim() == WORDS
}
