namespace Rollout.Server.Commands;

/// <summary>What the process ends with.</summary>
internal static class ExitCode
{
    public const int Ok = 0;

    /// <summary>The input was fine; the work could not be done.</summary>
    public const int Failure = 1;

    /// <summary>The command line, the model or the request has to change first.</summary>
    public const int BadInput = 2;
}

/// <summary>Input that cannot be used; every problem is a line a person can act on.</summary>
internal sealed class BadInputException(IReadOnlyList<string> problems) : Exception(string.Join("; ", problems))
{
    public IReadOnlyList<string> Problems { get; } = problems;
}

/// <summary>Work that could not be done, in words for a person.</summary>
internal sealed class FailureException(string message) : Exception(message);
