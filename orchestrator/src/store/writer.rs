//! SQLite's one writer: a task that owns the connection, and makes what waits for it durable by one commit.
//!
//! # Guarantees
//! * Nobody is answered before the commit that holds their change.
//! * An intent that fails or breaks takes back what it did itself, and nothing of those beside it.
//! * Where the commit fails, or the database gives up the transaction (a full disk), everybody in it is told so.
//! * An intent that was asked for is made, even if whoever asked is gone.

use super::StoreError;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sqlx::SqliteConnection;
use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// So many intents share a commit at most: what each of them waits for stays short.
const GROUP: usize = 128;
/// So many wait before those who ask do.
const WAITING: usize = 1_024;

/// The writer as others ask it. Clones are the same one.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    queue: mpsc::Sender<Box<dyn Intent>>,
    committed: Arc<Notify>,
    closing: CancellationToken,
    task: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Writer {
    /// Writes by that connection, from now on.
    pub(super) fn start(db: SqliteConnection) -> Self {
        let (queue, asked) = mpsc::channel(WAITING);
        let closing = CancellationToken::new();
        let committed = Arc::<Notify>::default();
        let task = tokio::spawn(work(db, asked, committed.clone(), closing.clone()));
        Self {
            queue,
            committed,
            closing,
            task: Arc::new(Mutex::new(Some(task))),
        }
    }

    /// Makes an intent; durable when this returns.
    pub(super) async fn write<T, F>(&self, intent: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, Result<T, StoreError>>
            + Send
            + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let asked = Box::new(Asked { intent, answer });
        let closed = StoreError::TakesNone("is closed");
        if self.queue.send(asked).await.is_err() {
            return Err(closed);
        }
        answered.await.unwrap_or(Err(closed))
    }

    /// Returns once something was committed since it returned last, or could not be: to move the log may help.
    pub(super) async fn committed(&self) {
        self.committed.notified().await;
    }

    /// Makes what waits, and ends.
    pub(super) async fn close(&self) {
        self.closing.cancel();
        let task = self
            .task
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(task) = task {
            // It broke, if at all, in a way that was told to whoever waited.
            let _ = task.await;
        }
    }
}

/// Something to be made in a transaction that others share.
trait Intent: Send {
    /// Makes it, and says who is to be answered what.
    fn make(self: Box<Self>, db: &mut SqliteConnection) -> BoxFuture<'_, Made>;

    /// It cannot be made.
    fn refuse(self: Box<Self>, why: &str);
}

/// What became of an intent, before the commit.
enum Made {
    /// It did what it wanted.
    Kept(Answer),
    /// What it did is to be taken back.
    Undone(Answer),
}

/// Answers, once the commit is made, or why it failed.
type Answer = Box<dyn FnOnce(Result<(), &str>) + Send>;

struct Asked<T, F> {
    intent: F,
    answer: oneshot::Sender<Result<T, StoreError>>,
}

impl<T, F> Intent for Asked<T, F>
where
    T: Send + 'static,
    F: for<'c> FnOnce(&'c mut SqliteConnection) -> BoxFuture<'c, Result<T, StoreError>>
        + Send
        + 'static,
{
    fn make(self: Box<Self>, db: &mut SqliteConnection) -> BoxFuture<'_, Made> {
        let Self { intent, answer } = *self;
        Box::pin(async move {
            let broke = |_| Err(StoreError::Refused("a change that broke".to_owned()));
            let done = AssertUnwindSafe(async { intent(db).await });
            let done = done.catch_unwind().await;
            // Nobody may listen any more; that is theirs to know.
            match done.unwrap_or_else(broke) {
                Ok(value) => Made::Kept(Box::new(move |committed| {
                    let _ = answer.send(committed.map(|()| value).map_err(not_written));
                })),
                Err(error) => Made::Undone(Box::new(move |_| {
                    let _ = answer.send(Err(error));
                })),
            }
        })
    }

    fn refuse(self: Box<Self>, why: &str) {
        let _ = self.answer.send(Err(not_written(why)));
    }
}

fn not_written(why: &str) -> StoreError {
    StoreError::NotWritten(why.to_owned())
}

async fn work(
    mut db: SqliteConnection,
    mut asked: mpsc::Receiver<Box<dyn Intent>>,
    committed: Arc<Notify>,
    closing: CancellationToken,
) {
    let mut intents = Vec::with_capacity(GROUP);
    loop {
        tokio::select! {
            biased;
            there_are = asked.recv_many(&mut intents, GROUP) => {
                if there_are == 0 {
                    break;
                }
                let mut group: VecDeque<_> = intents.drain(..).collect();
                let mut answers = Vec::with_capacity(group.len());
                let done = commit(&mut db, &mut group, &mut answers).await;
                committed.notify_one();
                let why = done.as_ref().map_err(ToString::to_string);
                if why.is_err() {
                    // The database may have ended it by itself.
                    let _ = run(&mut db, "ROLLBACK").await;
                }
                for answer in answers {
                    answer(why.as_ref().map(|_| ()).map_err(String::as_str));
                }
                for intent in group {
                    intent.refuse(why.as_ref().err().map_or("", String::as_str));
                }
            }
            () = closing.cancelled(), if !asked.is_closed() => asked.close(),
        }
    }
    // What was committed is safe without.
    let _ = sqlx::Connection::close(db).await;
}

async fn run(db: &mut SqliteConnection, statement: &'static str) -> Result<(), sqlx::Error> {
    sqlx::query(statement).execute(db).await?;
    Ok(())
}

/// Makes a group of intents, in their order, and commits. Statements that need no answer between them go together: each time the
/// connection is asked costs as much as a small statement.
async fn commit(
    db: &mut SqliteConnection,
    group: &mut VecDeque<Box<dyn Intent>>,
    answers: &mut Vec<Answer>,
) -> Result<(), sqlx::Error> {
    run(db, "BEGIN IMMEDIATE; SAVEPOINT intent").await?;
    while let Some(intent) = group.pop_front() {
        match intent.make(db).await {
            Made::Kept(answer) => answers.push(answer),
            Made::Undone(answer) => {
                answers.push(answer);
                // Fails if the database gave up more than this intent.
                run(db, "ROLLBACK TO intent").await?;
            }
        }
        if !group.is_empty() {
            run(db, "RELEASE intent; SAVEPOINT intent").await?;
        }
    }
    run(db, "RELEASE intent; COMMIT").await
}
