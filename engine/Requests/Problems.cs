namespace Rollout.Engine;

/// <summary>One thing wrong with an input: which field, and what a person can do about it.</summary>
/// <param name="Field">
/// As the input's type names it, with an index where one element is wrong: <c>MaxTokens</c>, <c>Prompt[3]</c>. A surface that takes the
/// input in another form calls it what it is called there, see <see cref="Rename"/>.
/// </param>
/// <param name="Message">Names no other field than <see cref="OtherField"/>.</param>
/// <param name="Other">The field that <see cref="OtherField"/> stands for in the message; "" where there is none.</param>
public readonly record struct Problem(string Field, string Message, string Other = "")
{
    /// <summary>Stands in a message for the name of a second field that is part of the problem.</summary>
    public const string OtherField = "{other}";

    /// <summary>The same problem in another form's names.</summary>
    /// <param name="field">The field's name in that form, by its name here, without the index.</param>
    /// <param name="inMessage">As above, for the field that the message names.</param>
    public Problem Rename(Func<string, string> field, Func<string, string> inMessage)
    {
        int index = Field.IndexOf('[', StringComparison.Ordinal);
        string name = index < 0 ? field(Field) : field(Field[..index]) + Field[index..];
        return Other.Length == 0 ? new Problem(name, Message) : new Problem(name, Message, inMessage(Other));
    }

    public override string ToString()
        => Other.Length == 0 ? $"{Field}: {Message}" : $"{Field}: {Message.Replace(OtherField, Other, StringComparison.Ordinal)}";
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
