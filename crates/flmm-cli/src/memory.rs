//! The allocator, and when it gives memory back.
#![allow(unsafe_code, reason = "the allocator's settings are functions of a C library")]

use std::ffi::c_long;

use libmimalloc_sys as mimalloc;

// Every layer allocates and frees the same large buffers; the system allocator gives each back to the kernel and takes it
// again.
#[global_allocator]
static ALLOCATOR: ::mimalloc::MiMalloc = ::mimalloc::MiMalloc;

/// Numbers of options in mimalloc 3, which have no names in its Rust crate.
const ARENA_EAGER_COMMIT: mimalloc::mi_option_t = 4;
const PURGE_DELAY: mimalloc::mi_option_t = 15;

/// Before anything large is allocated: memory is taken as it is used. What mimalloc takes as a whole it does not give back.
pub(crate) fn set_up() {
    set(ARENA_EAGER_COMMIT, 0);
}

/// After a model was opened: what only opening needed is given back.
pub(crate) fn give_back() {
    // SAFETY: gives back memory that nobody holds.
    unsafe { mimalloc::mi_collect(true) };
}

/// Before training: from here on memory that is freed is kept, because every step needs as much again and would have to
/// clear its pages anew. An answer would be 5 % faster with it, but take a quarter of a gigabyte more.
pub(crate) fn keep() {
    give_back();
    set(PURGE_DELAY, -1);
}

/// Unless the option's variable of the environment (`MIMALLOC_PURGE_DELAY`) says otherwise.
fn set(option: mimalloc::mi_option_t, value: c_long) {
    // SAFETY: sets a number.
    unsafe { mimalloc::mi_option_set_default(option, value) };
}
