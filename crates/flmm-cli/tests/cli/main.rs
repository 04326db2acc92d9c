//! The program as users run it: arguments in, standard output, standard error, exit status and files out.

mod analyses;
mod answers;
mod bad_input;
mod bad_model;
mod bench;
mod convert;
mod eval_qa;
mod evaluate;
#[path = "../../../flmm/tests/common/fake_hub.rs"]
mod fake_hub;
#[path = "../../../flmm-eval/tests/common/judge.rs"]
#[allow(dead_code, reason = "some acts are for the judge's own tests")]
mod fake_judge;
mod help;
mod hub;
mod inspect_model;
#[path = "../../../flmm/tests/common/pickles.rs"]
mod pickles;
mod support;
mod train;
mod worlds;
