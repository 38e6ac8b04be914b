namespace Rollout.Engine;

/// <summary>One thing wrong with an input: the field, and a message for a person.</summary>
/// <param name="Field">
/// The name of the field in the input's type, with an index where one element is wrong: <c>MaxTokens</c>, <c>Prompt[3]</c>. A surface
/// with other names maps it to its own, see <see cref="Rename"/>.
/// </param>
/// <param name="Message">Names no other field than <see cref="OtherField"/>.</param>
/// <param name="Other">The field that <see cref="OtherField"/> stands for in the message; "" where there is none.</param>
public readonly record struct Problem(string Field, string Message, string Other = "")
{
    /// <summary>Placeholder in a message for the name of a second field that is part of the problem.</summary>
    public const string OtherField = "{other}";

    /// <summary>The same problem under another form's field names.</summary>
    /// <param name="field">Maps a field's name, without the index, to its name in the other form.</param>
    /// <param name="inMessage">The same, for the second field named in the message.</param>
    public Problem Rename(Func<string, string> field, Func<string, string> inMessage)
    {
        int index = Field.IndexOf('[', StringComparison.Ordinal);
        string name = index < 0 ? field(Field) : field(Field[..index]) + Field[index..];
        return Other.Length == 0 ? new Problem(name, Message) : new Problem(name, Message, inMessage(Other));
    }

    public override string ToString()
        => Field.Length == 0 ? Message
            : Other.Length == 0 ? $"{Field}: {Message}"
            : $"{Field}: {Message.Replace(OtherField, Other, StringComparison.Ordinal)}";
}

/// <summary>An invalid request: sending it again cannot succeed. Lists every problem, as far as there is room.</summary>
public sealed class InvalidRequestException(ProblemList problems)
    : Exception(problems.ToString())
{
    public ProblemList Problems { get; } = problems;
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
