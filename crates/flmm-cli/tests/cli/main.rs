//! The program as users run it: arguments in, standard output, standard error, exit status and files out.

mod answers;
mod bad_input;
mod bad_model;
mod help;
mod support;
mod worlds;
