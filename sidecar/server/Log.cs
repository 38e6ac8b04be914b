namespace Rollout.Server;

/// <summary>Everything the server writes to its log. Event ids are stable: alerts may be built on them.</summary>
internal static partial class Log
{
    // ---- 1..: the process.

    [LoggerMessage(EventId = 1, Level = LogLevel.Information, Message = "Listening on {Addresses}; loading {Model}")]
    public static partial void Listening(ILogger logger, string addresses, string model);

    [LoggerMessage(EventId = 2, Level = LogLevel.Information,
        Message = "Serving {Model}, weights version {Version}, on {Backend} after {Seconds:F1} s")]
    public static partial void Ready(ILogger logger, string model, ulong version, string backend, double seconds);

    [LoggerMessage(EventId = 3, Level = LogLevel.Information,
        Message = "Stopping: no new groups; groups in flight end with their partial tokens")]
    public static partial void Stopping(ILogger logger);

    [LoggerMessage(EventId = 4, Level = LogLevel.Information, Message = "Stopped")]
    public static partial void Stopped(ILogger logger);

    [LoggerMessage(EventId = 5, Level = LogLevel.Critical, Message = "The engine has failed and serves nothing any more: {Reason}")]
    public static partial void Faulted(ILogger logger, string reason);

    [LoggerMessage(EventId = 6, Level = LogLevel.Warning,
        Message = "{Address} can be reached from other machines, and calls are neither authenticated nor encrypted")]
    public static partial void OpenToNetwork(ILogger logger, string address);

    [LoggerMessage(EventId = 7, Level = LogLevel.Information, Message = "Removed {Path}, left behind by a server that is gone")]
    public static partial void StaleSocketRemoved(ILogger logger, string path);

    [LoggerMessage(EventId = 8, Level = LogLevel.Warning,
        Message = "The engine did not stop within {Seconds} s; leaving it to the end of the process")]
    public static partial void EngineStuck(ILogger logger, double seconds);

    // ---- 100..: generation.

    [LoggerMessage(EventId = 100, Level = LogLevel.Debug, Message = "Group {Id}: {Prompt} prompt tokens, {N} samples")]
    public static partial void GroupStarted(ILogger logger, string id, int prompt, int n);

    [LoggerMessage(EventId = 101, Level = LogLevel.Debug, Message = "{Call} refused with {Code}: {Reason}")]
    public static partial void Refused(ILogger logger, string call, string code, string reason);

    [LoggerMessage(EventId = 102, Level = LogLevel.Information,
        Message = "Aborted {Groups} groups, {Samples} samples; {Unknown} ids were not in flight")]
    public static partial void Aborted(ILogger logger, int groups, int samples, int unknown);

    [LoggerMessage(EventId = 103, Level = LogLevel.Error, Message = "{Call} failed with an internal error")]
    public static partial void Unexpected(ILogger logger, string call, Exception exception);

    // ---- 200..: weights.

    [LoggerMessage(EventId = 200, Level = LogLevel.Information,
        Message = "Update {Base} -> {New} by '{Owner}': {Tensors} tensors, {Bytes} bytes, {Mode}, {Milliseconds} ms to finish")]
    public static partial void UpdateBegun(
        ILogger logger, ulong @base, ulong @new, string owner, int tensors, ulong bytes, string mode, uint milliseconds);

    [LoggerMessage(EventId = 201, Level = LogLevel.Warning, Message = "Update by '{Owner}' rejected: {Problems}")]
    public static partial void UpdateRejected(ILogger logger, string owner, string problems);

    [LoggerMessage(EventId = 202, Level = LogLevel.Information,
        Message = "Update to {Version} committed: {Transfer:F3} s transfer, {Swap:F3} s to the swap, {Stall:F3} s of it stalled")]
    public static partial void UpdateCommitted(ILogger logger, ulong version, double transfer, double swap, double stall);

    [LoggerMessage(EventId = 203, Level = LogLevel.Warning, Message = "Update by '{Owner}' failed, {Outcome}: {Reason}")]
    public static partial void UpdateFailed(ILogger logger, string owner, string outcome, string reason);

    [LoggerMessage(EventId = 204, Level = LogLevel.Warning, Message = "Update by '{Owner}' aborted, {Outcome}: {Reason}")]
    public static partial void UpdateAborted(ILogger logger, string owner, string outcome, string reason);

    // ---- 300..: control.

    [LoggerMessage(EventId = 300, Level = LogLevel.Information,
        Message = "Paused ({Mode}) by '{Owner}' for {Milliseconds} ms; {Samples} samples aborted")]
    public static partial void Paused(ILogger logger, string mode, string owner, uint milliseconds, int samples);

    [LoggerMessage(EventId = 301, Level = LogLevel.Information, Message = "Resumed")]
    public static partial void Resumed(ILogger logger);

    [LoggerMessage(EventId = 302, Level = LogLevel.Information,
        Message = "{Tag} sleeps: {Freed} bytes freed of {Allocated} allocated; the host keeps {Kept}")]
    public static partial void Slept(ILogger logger, string tag, long freed, long allocated, long kept);

    [LoggerMessage(EventId = 303, Level = LogLevel.Information, Message = "Woken up; asleep now: {Asleep}")]
    public static partial void WokenUp(ILogger logger, string asleep);
}
