//! Named mistakes in the order in which the engine does things, for the simulator, and the last ones for the model checker, to find: a
//! proof that they would find such a mistake if somebody made it.
//!
//! Each place at which one can be made asks [`Mutation::is_on`], which outside of the tests is the constant `false`, so that nothing of
//! it is left in a build. The tests [switch](Mutation::switch) one on, for the thread that plays the simulator. (Barriers need no mistake
//! of their own: the simulator leaves out any one that has a name, [`crate::io::Barrier`].)

/// A mistake. docs/testing.md lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code, reason = "nobody switches one on"))]
pub(crate) enum Mutation {
    /// A write takes its clusters into the mapping first, and writes their data then.
    MappingBeforeData,
    /// A commit writes the mapping, and then the refcounts that it needs.
    MappingBeforeRefcounts,
    /// A commit writes new L2 tables after the L1 entries that name them.
    L1BeforeNewTables,
    /// A commit writes L2 slices as they are when it writes them, not as they were when it began.
    SlicesReadLate,
    /// What has changed while a commit wrote it counts as written.
    ChangedCountsAsWritten,
    /// A flush is content with the commit that was running when it came.
    FlushJoinsRunningCommit,
    /// A slice that is not in the file yet makes room for another.
    DirtySliceEvicted,
    /// A cluster can be used again before the mapping that dropped it is durable.
    FreedBeforeDurable,
    /// A cluster can be used again while requests of its time are in flight.
    FreedUnderRequests,
    /// A cluster can be used again before its punch is done.
    ReusedBeforePunch,
    /// A cluster is punched when it loses a reference, though it may have others.
    SharedPunched,
    /// A cluster that was used before is taken to hold zeros.
    UsedTakenForZero,
    /// What lies before the data in a new cluster is not copied.
    HeadNotCopied,
    /// What lies behind the data in a new cluster is not copied.
    TailNotCopied,
    /// Writers to one cluster do not wait for each other.
    WritersUnlocked,
    /// A flush that failed is forgotten.
    FailedFlushForgotten,
    /// The header names a larger refcount table before that is written.
    HeaderBeforeRefTable,
    /// The old refcount table's clusters are free before the header that names the new one is durable.
    OldRefTableFreedEarly,
    /// The header names new tables before they, and the counts, are durable.
    HeaderBeforeTables,
    /// A snapshot is taken, and the active tables keep their COPIED flags.
    SnapshotKeepsCopied,
    /// A snapshot is deleted by dropping its tree first, and then taking it out of the table.
    SnapshotDroppedFirst,
    /// A disk is shrunk by dropping what lies past its new end first, and then saying the size.
    ShrunkBeforeHeader,
    /// A refcount block that counts nothing is freed, and then the table names it no more.
    RefblockFreedFirst,
    /// The journal tells of a record only with the next one.
    RecordAfterAcknowledgement,
    /// A commit takes records out of the journal before it has written what they say.
    TailAdvancedEarly,
    /// A replay publishes what the journal says, and leaves the refcounts as they are.
    ReplayWithoutRefcounts,
    /// A replay gives out clusters that the journal names, where the file does not count them yet.
    NamedGivenOut,
    /// A replay frees what leaked first, and then sees whether the journal fits the image.
    LeaksBeforeReplay,
    /// Without a journal a request is answered when the mapping has changed in memory.
    AnswerBeforeMapping,
    /// Without a journal a cluster is written in place that the file's mapping does not have yet, and that is answered at once.
    UnsettledPlaceWritten,
    /// A reader of a cached slice does not look at its tag again.
    TagLookedAtOnce,
    /// The two words of an extended entry change while their slice's tag names it.
    PairChangedInTheOpen,
    /// A request that enters does not look whether the gate has closed meanwhile.
    EnterLooksOnce,
    /// A request that leaves does not tell who closes the gate.
    LeaveTellsNobody,
    /// A cluster is free of users when the epoch has moved on once.
    OneEpochIsEnough,
    /// Who gives a lock back wakes only the first who waits.
    OneWaiterWoken,
    /// Ranges that begin in different places count as apart.
    RangesComparedByStart,
    /// Flushes of one file run side by side.
    FlushesSideBySide,
    /// A thread looks for tasks that others made ready, and says then that it sleeps.
    LooksBeforeItSleeps,
}

impl Mutation {
    /// Whether the engine is to make this mistake.
    #[cfg(not(test))]
    #[inline]
    pub(crate) const fn is_on(self) -> bool {
        false
    }
}

#[cfg(test)]
thread_local! {
    static ON: std::cell::Cell<Option<Mutation>> = const { std::cell::Cell::new(None) };
}

#[cfg(test)]
impl Mutation {
    /// Whether the engine is to make this mistake.
    pub(crate) fn is_on(self) -> bool {
        ON.get() == Some(self)
    }

    /// From now on the engine makes this mistake on this thread, or (None) none.
    pub(crate) fn switch(mutation: Option<Self>) {
        ON.set(mutation);
    }
}
