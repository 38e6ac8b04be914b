using System.CommandLine;
using System.CommandLine.Help;
using System.CommandLine.Invocation;
using Grpc.Core;
using Rollout.Engine;
using Rollout.Native;
using Rollout.Server.Generation;
using Rollout.Server.Grpc;

namespace Rollout.Server.Commands;

/// <summary>The `rollout` command: parses, runs, and reports errors as lines on standard error and an exit code.</summary>
internal static class CommandLine
{
    public static async Task<int> RunAsync(string[] args)
    {
        RootCommand root = new("Rollout: the inference side of RL post-training.")
        {
            ServeCommand.Create(),
            GenerateCommand.Create(),
            ScoreCommand.Create(),
            InspectCommand.Create(),
        };
        ParseResult parsed = root.Parse(args);
        if (parsed.Action is ParseErrorAction || (parsed.Errors.Count > 0 && parsed.Action is not HelpAction))
        {
            string hint = parsed.CommandResult.Command == root ? "rollout --help" : $"rollout {parsed.CommandResult.Command.Name} --help";
            Complain([.. parsed.Errors.Select(error => error.Message), $"see {hint}"]);
            return ExitCode.BadInput;
        }

        // The server handles Ctrl+C itself and may take long to stop; it cancels the other commands.
        bool serves = parsed.CommandResult.Command.Name == ServeCommand.Name;
        InvocationConfiguration configuration = new()
        {
            EnableDefaultExceptionHandler = false,
            ProcessTerminationTimeout = serves ? null : TimeSpan.FromSeconds(2),
        };
        try
        {
            return await parsed.InvokeAsync(configuration);
        }
        catch (Exception e) when (Explain(e) is { } explained)
        {
            Complain(explained.Lines);
            return explained.Code;
        }
    }

    private static (int Code, IReadOnlyList<string> Lines)? Explain(Exception exception) => exception switch
    {
        BadInputException e => (ExitCode.BadInput, e.Problems),
        InvalidModelException e => (ExitCode.BadInput, [.. e.Problems.Select(problem => $"{e.Path}: {problem}")]),
        InvalidRequestException e => (ExitCode.BadInput, [.. e.Problems.Select(problem => problem.ToString())]),
        RpcException { StatusCode: StatusCode.InvalidArgument } e => (ExitCode.BadInput, e.Status.Detail.Split("; ")),
        RpcException { StatusCode: StatusCode.Unavailable } e =>
            (ExitCode.Failure, [$"the server cannot be reached or is not ready: {e.Status.Detail}"]),
        RpcException e => (ExitCode.Failure, [$"{e.StatusCode}: {e.Status.Detail}"]),
        ScoreFailedException => (ExitCode.Failure, [$"{Errors.ToStatus(exception)?.StatusCode}: {exception.Message}"]),
        FailureException or NoRoomException or EngineFaultedException or EngineStateException => (ExitCode.Failure, [exception.Message]),
        CudaException => (ExitCode.Failure, [exception.Message]),
        OutOfMemoryException => (ExitCode.Failure, [$"not enough memory: {exception.Message}"]),
        IOException or UnauthorizedAccessException => (ExitCode.Failure, [exception.Message]),
        OperationCanceledException => (ExitCode.Failure, ["cancelled"]),
        _ => null,
    };

    private static void Complain(IReadOnlyList<string> lines)
    {
        foreach (string line in lines.Take(ProblemList.Most)) Console.Error.WriteLine($"rollout: {line}");
        if (lines.Count > ProblemList.Most) Console.Error.WriteLine($"rollout: and {lines.Count - ProblemList.Most} more");
    }
}
