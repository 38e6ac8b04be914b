namespace Rollout.Engine;

/// <summary>One thing wrong with an input: which field, and what a person can do about it.</summary>
public readonly record struct Problem(string Field, string Message)
{
    public override string ToString() => $"{Field}: {Message}";
}

/// <summary>A request that can never run as it stands. Lists everything wrong with it, not the first thing found.</summary>
public sealed class InvalidRequestException(IReadOnlyList<Problem> problems)
    : Exception(string.Join("; ", problems))
{
    public IReadOnlyList<Problem> Problems { get; } = problems;
}

/// <summary>The engine has no room for the request now; the same request may be accepted later.</summary>
public sealed class NoRoomException(string message) : Exception(message);

/// <summary>The call is not allowed in the state the engine is in; the message names the state.</summary>
public sealed class EngineStateException(EngineState state, string message) : Exception(message)
{
    public EngineState State { get; } = state;
}

/// <summary>The device or an invariant failed: the engine serves nothing any more.</summary>
public sealed class EngineFaultedException(string reason) : Exception($"the engine has failed and must be restarted: {reason}");
