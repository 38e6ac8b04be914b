namespace Rollout.Server.Commands;

/// <summary>Exit codes of the process.</summary>
internal static class ExitCode
{
    public const int Ok = 0;

    /// <summary>The input was valid, but the command failed.</summary>
    public const int Failure = 1;

    /// <summary>The command line, the model or the request is invalid.</summary>
    public const int BadInput = 2;
}

/// <summary>Invalid input, with one line for each problem.</summary>
internal sealed class BadInputException(IReadOnlyList<string> problems) : Exception(string.Join("; ", problems))
{
    public IReadOnlyList<string> Problems { get; } = problems;
}

/// <summary>A failure with a readable message.</summary>
internal sealed class FailureException(string message) : Exception(message);
