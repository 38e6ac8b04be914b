namespace Rollout.Client;

/// <summary>The sidecar's process could not be started, or ended before it was ready.</summary>
public sealed class SidecarException(string message, IReadOnlyList<string> lastLines, Exception? inner = null)
    : RolloutException(Describe(message, lastLines), inner)
{
    /// <summary>Null where it never ran or this client stopped it.</summary>
    public int? ExitCode { get; init; }

    /// <summary>The last lines it printed.</summary>
    public IReadOnlyList<string> LastLines { get; } = lastLines;

    private static string Describe(string message, IReadOnlyList<string> lastLines) => lastLines.Count == 0
        ? message
        : $"{message}{Environment.NewLine}{string.Join(Environment.NewLine, lastLines.Select(line => "  | " + line))}";
}
