use std::path::Path;

use super::*;
use crate::io::sim::World;
use crate::io::{Buffer, Storage};

/// Lives as long as a task.
struct Owned(Rc<Cell<bool>>);

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

/// A driver whose operations never end before it is dropped, and which notes whether the task still lived then.
struct Slow {
    alive: Rc<Cell<bool>>,
    lived: Rc<Cell<Option<bool>>>,
    notify: Arc<dyn Notify>,
}

impl Driver for Slow {
    fn submit(&mut self, _token: u64, _file: RawFd, _op: Op) {}

    fn watch(&mut self, _fd: RawFd, _token: u64) -> io::Result<()> {
        Ok(())
    }

    fn wait(&mut self, _block: bool, _done: &mut Vec<Completion>) -> io::Result<()> {
        Ok(())
    }

    fn notifier(&self) -> Arc<dyn Notify> {
        self.notify.clone()
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.lived.set(Some(self.alive.get()));
    }
}

#[test]
fn shut_down_ends_the_operations_before_the_tasks_that_own_their_memory() {
    let world = World::orderly();
    let file = world.create(Path::new("/file")).unwrap();
    let (alive, lived) = (Rc::new(Cell::new(true)), Rc::new(Cell::new(None)));
    let notify = world.driver().unwrap().notifier();
    let queue = Queue::new(Box::new(Slow { alive: alive.clone(), lived: lived.clone(), notify }));
    queue.spawn({
        let (queue, owned) = (queue.clone(), Owned(alive));
        async move {
            let buffer = Buffer::zeroed(512);
            let _ = queue.read(&file, 0, vec![buffer.seg(0, 512)]).await;
            drop((buffer, owned));
        }
    });
    queue.turn(false, &mut Vec::new()).unwrap();
    queue.shut_down();
    assert_eq!(lived.get(), Some(true));
    assert_eq!(queue.live_tasks(), 0);
    assert!(queue.turn(false, &mut Vec::new()).is_err());
}
