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
            Complain([.. parsed.Errors.Select(error => error.Message), .. Suggestions(parsed), $"see {hint}"]);
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

    /// <summary>For words that are nearly a command's or an option's name.</summary>
    private static IEnumerable<string> Suggestions(ParseResult parsed)
    {
        Command command = parsed.CommandResult.Command;
        string[] names = [.. command.Subcommands.Select(known => known.Name), .. command.Options.Select(known => known.Name)];
        foreach (string word in parsed.UnmatchedTokens)
        {
            string? nearest = names.MinBy(name => Edits(word, name));
            if (nearest is not null && Edits(word, nearest) <= Math.Min(2, word.Length / 2)) yield return $"did you mean '{nearest}'?";
        }
    }

    /// <summary>Letters to insert, delete, replace or exchange to make one word of the other (Damerau-Levenshtein).</summary>
    internal static int Edits(string a, string b)
    {
        int[,] edits = new int[a.Length + 1, b.Length + 1];
        for (int i = 0; i <= a.Length; i++) edits[i, 0] = i;
        for (int j = 0; j <= b.Length; j++) edits[0, j] = j;
        for (int i = 1; i <= a.Length; i++)
        {
            for (int j = 1; j <= b.Length; j++)
            {
                int replaced = edits[i - 1, j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1);
                edits[i, j] = Math.Min(replaced, Math.Min(edits[i - 1, j], edits[i, j - 1]) + 1);
                bool exchanged = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
                if (exchanged) edits[i, j] = Math.Min(edits[i, j], edits[i - 2, j - 2] + 1);
            }
        }

        return edits[a.Length, b.Length];
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
