//! The simulator as a command.

use super::scenario;
use super::world::{Failure, Mutant, Options, Stats, run};
use std::ops::Range;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

const HELP: &str = "\
Runs simulated clusters under faults, and judges what their guests see.

  scripts/simulate [options]

  --seed N         the first seed, 1 if not said; without --seeds the only one
  --seeds N        how many seeds to run
  --nodes N        nodes to begin with; drawn from 5 to 12 if not said
  --steps N        steps of 10 ms with faults, 1500 if not said; then the faults end, and the
                   cluster has to come to rest
  --scenario FILE  runs a script instead of seeds (see cluster/tests/scenarios/README.md)
  --mutant NAME    breaks a rule on purpose; the run is to fail
  --threads N      how many seeds to run at a time; one per processor if not said
  --trace          prints everything that happens
  --untouched      what nobody reads after the faults has to become equal as well; a few seeds in
                   10,000 fail
  --help           prints this

A failing seed is run again, and the last lines of its trace are printed.
Ends with 0 if all is well, with 1 if a rule was violated, with 2 if the command is not understood.
";

/// Lines of the trace of a failing seed that are printed.
const TAIL: usize = 60;

struct Command {
    seeds: Range<u64>,
    options: Options,
    scenario: Option<String>,
    threads: usize,
}

enum Parsed {
    Help,
    Run(Command),
}

fn parse(args: impl Iterator<Item = String>) -> Result<Parsed, String> {
    let (mut seed, mut seeds, mut scenario) = (None, None, None);
    let mut threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut options = Options::seed(0);
    let mut args = args;
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        let number = |text: String| {
            text.parse::<u64>().map_err(|_| format!("{arg}: '{text}' is not a number"))
        };
        match arg.as_str() {
            "--help" | "-h" => return Ok(Parsed::Help),
            "--trace" => options.live = true,
            "--untouched" => options.untouched = true,
            "--seed" => seed = Some(number(value()?)?),
            "--seeds" => seeds = Some(number(value()?)?),
            "--steps" => options.steps = number(value()?)?,
            "--threads" => threads = number(value()?)?.clamp(1, 64) as usize,
            "--nodes" => {
                let nodes = number(value()?)?;
                if !(1..=4000).contains(&nodes) {
                    return Err("--nodes: from 1 to 4000 are possible".into());
                }
                options.nodes = Some(nodes as usize);
            }
            "--scenario" => scenario = Some(value()?),
            "--mutant" => options.mutant = mutant(&value()?)?,
            other => return Err(format!("unknown option '{other}'")),
        }
    }
    let first = seed.unwrap_or(1);
    let seeds = first..first.saturating_add(seeds.unwrap_or(1));
    Ok(Parsed::Run(Command { seeds, options, scenario, threads }))
}

fn mutant(name: &str) -> Result<Mutant, String> {
    let known = |m: &Mutant| format!("{m:?}").eq_ignore_ascii_case(name);
    Mutant::ALL.into_iter().find(known).ok_or_else(|| {
        let all: Vec<String> = Mutant::ALL.iter().map(|m| format!("{m:?}")).collect();
        format!("no mutant '{name}'; there are {}", all.join(", "))
    })
}

/// What became of some seeds.
#[derive(Default)]
pub struct Summary {
    pub stats: Stats,
    pub runs: u64,
    /// In the order of their seeds.
    pub failures: Vec<(u64, String)>,
}

/// Runs one seed; a panic is a failure like any other.
pub fn run_seed(options: Options) -> Result<(Stats, Vec<String>), Failure> {
    std::panic::catch_unwind(|| run(options)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no text");
        Err(Failure { problem: format!("panic: {text}"), trace: Vec::new() })
    })
}

/// Runs seeds, several at a time.
pub fn run_seeds(seeds: Range<u64>, options: Options, threads: usize, progress: bool) -> Summary {
    let next = AtomicU64::new(seeds.start);
    let summary = Mutex::new(Summary::default());
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let outcome = run_seed(Options { seed, ..options });
                    let mut summary = summary.lock().unwrap();
                    summary.runs += 1;
                    match outcome {
                        Ok((stats, _)) => summary.stats.add(&stats),
                        Err(failure) => summary.failures.push((seed, failure.problem)),
                    }
                    if progress && summary.runs.is_multiple_of(500) {
                        let (runs, failed) = (summary.runs, summary.failures.len());
                        let seconds = started.elapsed().as_secs();
                        eprintln!("{runs} seeds, {failed} failed, {seconds} s");
                    }
                }
            });
        }
    });
    let mut summary = summary.into_inner().unwrap();
    summary.failures.sort();
    summary
}

/// The whole command.
pub fn main(args: impl Iterator<Item = String>) -> ExitCode {
    match parse(args) {
        Ok(Parsed::Help) => {
            print!("{HELP}");
            ExitCode::SUCCESS
        }
        Ok(Parsed::Run(command)) => execute(&command),
        Err(problem) => {
            eprintln!("simulate: {problem}; --help tells more");
            ExitCode::from(2)
        }
    }
}

fn execute(command: &Command) -> ExitCode {
    if let Some(file) = &command.scenario {
        return run_scenario(file, command);
    }
    let single = command.seeds.end - command.seeds.start == 1;
    let mut options = command.options;
    options.live &= single;
    let started = Instant::now();
    let summary = run_seeds(command.seeds.clone(), options, command.threads, true);
    for (seed, problem) in &summary.failures {
        println!("seed {seed}: {problem}");
    }
    if let (Some((seed, _)), false) = (summary.failures.first(), options.live) {
        print_tail(Options { seed: *seed, trace: true, ..options });
    }
    println!(
        "{} seeds, {} failed, {:.1} s: {:?}",
        summary.runs,
        summary.failures.len(),
        started.elapsed().as_secs_f64(),
        summary.stats
    );
    if summary.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print_tail(options: Options) {
    let Err(failure) = run_seed(options) else {
        println!("seed {} passes when it is run again: the simulator is broken", options.seed);
        return;
    };
    println!("the end of seed {} (all of it: --seed {} --trace):", options.seed, options.seed);
    let skip = failure.trace.len().saturating_sub(TAIL);
    failure.trace.iter().skip(skip).for_each(|line| println!("  {line}"));
}

fn run_scenario(file: &str, command: &Command) -> ExitCode {
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) => {
            eprintln!("simulate: {file}: {error}");
            return ExitCode::from(2);
        }
    };
    let options = Options { seed: command.seeds.start, ..command.options };
    match scenario::run(&text, options) {
        Ok(_) => {
            println!("{file}: all as expected");
            ExitCode::SUCCESS
        }
        Err(scenario::Error::Syntax(problem)) => {
            eprintln!("simulate: {file}: {problem}");
            ExitCode::from(2)
        }
        Err(scenario::Error::Run(failure)) => {
            println!("{file}: {}", failure.problem);
            ExitCode::FAILURE
        }
    }
}
