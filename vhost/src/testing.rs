//! What the unit tests share with the tests in `tests/`.

#[path = "../tests/support/disk.rs"]
#[allow(dead_code, reason = "each user needs a part of it")]
pub(crate) mod disk;
#[path = "../tests/support/driver.rs"]
#[allow(dead_code, reason = "each user needs a part of it")]
pub(crate) mod driver;
/// A process that dies between two stores.
pub(crate) mod death {
    use std::cell::RefCell;

    type Hook = Box<dyn FnMut()>;

    thread_local! {
        static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
    }

    /// Has this thread call `hook` after each store that a successor looks at; `None` ends it.
    pub(crate) fn watch(hook: Option<Hook>) {
        HOOK.set(hook);
    }

    pub(crate) fn point() {
        HOOK.with_borrow_mut(|hook| hook.iter_mut().for_each(|hook| hook()));
    }
}
