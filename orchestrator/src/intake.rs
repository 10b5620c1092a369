//! Taking sessions: those that are asked for while others are written come into the store together, by one transaction.
//!
//! # Guarantees
//! * Nobody is answered before the commit that holds their session.
//! * A session that was accepted has a worker, also if whoever asked for it is gone.
//! * Who cannot be taken soon is told so at once: no more wait than are taken within a moment.

use crate::control::{Control, Refused, Shared};
use crate::session::Record;
use crate::store::{Accepted, Idempotency};
use mayfly_api::{Problem, ProblemCode};
use std::time::Instant;
use tokio::sync::{mpsc, oneshot};
use tracing::{error, info};

/// So many are taken by one transaction at most.
const GROUP: usize = 256;
/// So many wait for one, at most.
const WAITING: usize = 4_096;

/// Where sessions are asked for. Clones are the same one.
#[derive(Clone, Debug)]
pub(crate) struct Intake(mpsc::Sender<Asked>);

/// What is to be taken; see [`work`].
pub(crate) type Wishes = mpsc::Receiver<Asked>;

#[derive(Debug)]
pub(crate) struct Asked {
    record: Record,
    idempotency: Option<Idempotency>,
    answer: oneshot::Sender<Result<Accepted, Problem>>,
}

impl Intake {
    pub(crate) fn new() -> (Self, Wishes) {
        let (asked, wishes) = mpsc::channel(WAITING);
        (Self(asked), wishes)
    }

    /// Takes a session: durable when this returns.
    pub(crate) async fn accept(
        &self,
        record: Record,
        idempotency: Option<Idempotency>,
    ) -> Result<Accepted, Refused> {
        let (answer, answered) = oneshot::channel();
        let asked = Asked {
            record,
            idempotency,
            answer,
        };
        self.0.try_send(asked).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Refused::new(
                ProblemCode::Overloaded,
                format!("{WAITING} requests wait to be written already; ask again in a moment"),
            ),
            mpsc::error::TrySendError::Closed(_) => stopping(),
        })?;
        Ok(answered.await.map_err(|_| stopping())??)
    }
}

fn stopping() -> Refused {
    Refused::new(
        ProblemCode::ShuttingDown,
        "the orchestrator is stopping; ask again when it is back",
    )
}

/// Takes what is asked for, until the orchestrator stops.
pub(crate) async fn work(control: Control, mut wishes: Wishes) {
    let shared = control.shared.clone();
    let mut asked = Vec::with_capacity(GROUP);
    loop {
        tokio::select! {
            () = shared.stopping.cancelled() => return,
            _ = wishes.recv_many(&mut asked, GROUP) => {}
        }
        take(&control, &shared, asked.drain(..)).await;
    }
}

async fn take(control: &Control, shared: &Shared, asked: impl Iterator<Item = Asked>) {
    let (mut wishes, mut waiting) = (Vec::new(), Vec::new());
    for asked in asked {
        // Before the commit: nothing that happens to it is missed.
        let changes = shared.hub.follow(asked.record.id);
        waiting.push((asked.record.id, changes, asked.answer));
        wishes.push((asked.record, asked.idempotency));
    }
    let begun = Instant::now();
    let accepted = shared
        .store
        .accept_all(wishes, shared.config.limits.max_queued);
    let accepted = accepted.await;
    shared.metrics.stored("accept", begun.elapsed());
    let mut accepted = match accepted {
        Ok(accepted) => accepted.into_iter().map(Ok).collect(),
        Err(error) => {
            error!(%error, "sessions were not accepted");
            Vec::new()
        }
    }
    .into_iter();
    for (id, changes, answer) in waiting {
        let accepted = accepted.next().unwrap_or_else(|| {
            Err(Problem::new(
                ProblemCode::Internal,
                "the orchestrator's database failed; its log says more",
            ))
        });
        if let Ok(Accepted::New(record)) = &accepted {
            info!(session = %id, user = record.wish.user, template = record.wish.template, "accepted");
            control.work_for_new((**record).clone(), changes);
        } else {
            drop(changes);
            shared.hub.leave(id);
        }
        // Whoever asked may be gone; their session is there all the same.
        let _ = answer.send(accepted);
    }
    shared.queue_grew();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Limits;
    use crate::session::{Expected, Origin, Wish};
    use futures_util::FutureExt;
    use jiff::Timestamp;
    use mayfly_api::SessionId;

    fn asked() -> Record {
        let wish = Wish::of_somebody(Origin::V1);
        let (limits, now) = (Limits::default(), Timestamp::now());
        Record::accepted(SessionId::new(), wish, Expected::default(), &limits, now)
    }

    #[test]
    fn who_cannot_be_taken_soon_is_told_so_at_once() {
        let (intake, wishes) = Intake::new();
        let told = |code| {
            let answer = intake.accept(asked(), None).now_or_never();
            matches!(answer, Some(Err(Refused::Problem(problem))) if problem.code == code)
        };
        for _ in 0..WAITING {
            assert!(intake.accept(asked(), None).now_or_never().is_none());
        }
        assert!(told(ProblemCode::Overloaded));
        drop(wishes);
        assert!(told(ProblemCode::ShuttingDown));
    }
}
