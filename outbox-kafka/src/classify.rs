//! What each error of librdkafka means for a message.

use rdkafka::types::RDKafkaErrorCode as Code;

/// What an error means. As [`outbox_core::Outcome`], without the reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// This message can never go.
    Poison,
    /// Its topic cannot be written to now.
    TopicBlocked,
    /// Nobody can go.
    Outage,
    /// It may or may not have been written.
    Unknown,
    /// The producer is dead.
    Broken,
}

/// The class of an error that ended a message.
///
/// librdkafka retries, in order and without end, whatever may pass (no leader, too few replicas, a cut
/// connection): what comes out at last is permanent. Hence an error of the broker's that is not named here is the
/// message's own, and a local one that is not named is taken as unknown, which loses nothing.
pub(crate) fn classify(code: Code) -> Class {
    match code {
        Code::TopicAuthorizationFailed
        | Code::UnknownTopicOrPartition
        | Code::UnknownTopic
        | Code::UnknownPartition
        | Code::UnknownTopicId
        | Code::LeaderNotAvailable
        // Not this message's fault: the whole topic has an older format than the producer writes.
        | Code::UnsupportedForMessageFormat
        | Code::UnsupportedCompressionType
        // Neither is this: the time is that of this machine's clock, which the topic finds to be wrong.
        | Code::InvalidTimestamp => Class::TopicBlocked,

        Code::Authentication
        | Code::SaslAuthenticationFailed
        | Code::UnsupportedSASLMechanism
        | Code::IllegalSASLState
        | Code::SecurityDisabled
        | Code::ClusterAuthorizationFailed
        | Code::SSL
        | Code::AllBrokersDown
        | Code::BrokerTransportFailure
        | Code::Resolve => Class::Outage,

        Code::Fatal
        | Code::GaplessGuarantee
        | Code::Fenced
        | Code::ProducerFenced
        | Code::OutOfOrderSequenceNumber
        | Code::InvalidProducerEpoch
        | Code::InvalidProducerIdMapping
        | Code::UnknownProducerId => Class::Broken,

        // Named, because as errors of the broker's they would pass for the message's own.
        Code::RequestTimedOut
        | Code::InvalidMessage
        | Code::NotEnoughReplicas
        | Code::NotEnoughReplicasAfterAppend
        | Code::NotLeaderForPartition
        | Code::KafkaStorageError
        | Code::NetworkException
        | Code::ThrottlingQuotaExceeded
        | Code::Unknown => Class::Unknown,

        // What librdkafka refuses before it sends anything. (`BadMessage` is not: so it calls an answer that it cannot
        // read, and what was asked may have been done.)
        Code::InvalidArgument => Class::Poison,

        code if !is_local(code) => Class::Poison,
        _ => Class::Unknown,
    }
}

/// Whether it is librdkafka's own error and no broker's.
pub(crate) const fn is_local(code: Code) -> bool {
    (code as i32) <= 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_has_its_errors() {
        let table = [
            (Code::MessageSizeTooLarge, Class::Poison),
            (Code::MessageBatchTooLarge, Class::Poison),
            (Code::InvalidRecord, Class::Poison),
            (Code::PolicyViolation, Class::Poison),
            // A name that a broker calls illegal never becomes legal, unlike a topic that is only unknown.
            (Code::InvalidTopic, Class::Poison),
            (Code::InvalidArgument, Class::Poison),
            (Code::BadMessage, Class::Unknown),
            (Code::TopicAuthorizationFailed, Class::TopicBlocked),
            (Code::UnknownTopicOrPartition, Class::TopicBlocked),
            (Code::UnknownTopic, Class::TopicBlocked),
            (Code::UnknownPartition, Class::TopicBlocked),
            (Code::InvalidTimestamp, Class::TopicBlocked),
            (Code::Authentication, Class::Outage),
            (Code::SSL, Class::Outage),
            (Code::AllBrokersDown, Class::Outage),
            (Code::BrokerTransportFailure, Class::Outage),
            (Code::PurgeQueue, Class::Unknown),
            (Code::PurgeInflight, Class::Unknown),
            (Code::MessageTimedOut, Class::Unknown),
            (Code::InvalidDifferentRecord, Class::Unknown),
            (Code::RequestTimedOut, Class::Unknown),
            (Code::Unknown, Class::Unknown),
            (Code::Fatal, Class::Broken),
            (Code::GaplessGuarantee, Class::Broken),
            (Code::OutOfOrderSequenceNumber, Class::Broken),
        ];
        for (code, class) in table {
            assert_eq!(classify(code), class, "{code:?}");
        }
    }
}
