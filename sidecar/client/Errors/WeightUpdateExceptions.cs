namespace Rollout.Client;

/// <summary>Which weights are served after an update that did not succeed.</summary>
public enum UpdateOutcome
{
    /// <summary>The old weights are still served; nothing of the update is left behind.</summary>
    NotCommitted,

    /// <summary>The new version is served.</summary>
    Committed,

    /// <summary>An update in place ended half-way: the sidecar refuses to generate until a full push has succeeded.</summary>
    Poisoned,

    /// <summary>The sidecar did not answer. <see cref="RolloutClient.StatusAsync"/> tells once it answers again.</summary>
    Unknown,
}

/// <summary>One thing wrong with an update's manifest or versions.</summary>
public readonly record struct UpdateProblem(string Field, string Message)
{
    public override string ToString() => Field.Length == 0 ? Message : $"{Field}: {Message}";
}

/// <summary>The preflight found problems; no byte was sent and the old weights are still served.</summary>
public sealed class WeightUpdateRejectedException(IReadOnlyList<UpdateProblem> problems)
    : RolloutException($"the update was rejected: {string.Join("; ", problems)}")
{
    /// <summary>All problems that were found.</summary>
    public IReadOnlyList<UpdateProblem> Problems { get; } = problems;
}

/// <summary>An update that had begun did not succeed; <see cref="Outcome"/> says which weights are served now.</summary>
public class WeightUpdateFailedException(string message, UpdateOutcome outcome, Exception? inner = null)
    : RolloutException(message, inner)
{
    public UpdateOutcome Outcome { get; } = outcome;
}

/// <summary>
/// The sidecar serves the new version, but the digest of what it received is not that of what was sent. Push again: samples drawn from
/// this version cannot be trusted.
/// </summary>
public sealed class WeightDigestException(ulong version, string sent, string received) : WeightUpdateFailedException(
    $"version {version} was committed with digest {received}, but the digest of what was sent is {sent}", UpdateOutcome.Committed)
{
    public ulong Version { get; } = version;

    /// <summary>32 hexadecimal digits.</summary>
    public string Sent { get; } = sent;

    /// <summary>32 hexadecimal digits.</summary>
    public string Received { get; } = received;
}
