using System.CommandLine;
using System.Diagnostics;
using System.Globalization;
using System.Reflection;
using System.Text.Json;
using System.Text.Json.Nodes;
using Rollout.Client;
using Rollout.Kernels;
using Spectre.Console;

namespace Rollout.Load;

/// <summary>`start`: the time of Shape S from process start to its first token, and its memory then.</summary>
internal static class StartUp
{
    private static readonly int[] s_prompt = [1, 2, 3, 4, 5, 6, 7, 8];

    public static Command Create(Option<bool> json)
    {
        Option<int> repeats = new("--repeats") { Description = "Starts a number is the median of.", DefaultValueFactory = _ => 5 };
        repeats.Validators.Add(result =>
        {
            if (result.GetValueOrDefault<int>() < 1) result.AddError("--repeats: must be at least 1");
        });
        Command command = new("start", "From starting a sidecar with Shape S to its first token, beside reading the file; and its memory.")
        {
            json, repeats,
        };
        command.SetAction(async (arguments, cancellation) =>
        {
            if (arguments.GetValue(json))
            {
                PrintJson(await MeasureAsync(arguments.GetValue(repeats), new Progress<string>(), cancellation));
                return 0;
            }

            PrintTable(await AnsiConsole.Status().StartAsync("start", status =>
                MeasureAsync(arguments.GetValue(repeats), new Progress<string>(text => status.Status(text)), cancellation)));
            return 0;
        });
        return command;
    }

    private static async Task<Result> MeasureAsync(int repeats, IProgress<string> progress, CancellationToken cancellation)
    {
        string model = ShapeS.Folder();
        string file = Path.Combine(model, ShapeS.WeightsFile);
        Read(file); // brings it into the page cache
        List<double> reads = [];
        Dictionary<string, List<Start>> starts = WeightFormats.CpuNames.ToDictionary(name => name, _ => new List<Start>());
        for (int round = 1; round <= repeats; round++)
        {
            progress.Report($"round {round} of {repeats}");
            reads.Add(Read(file));
            foreach ((string dtype, List<Start> all) in starts) all.Add(await StartAsync(model, dtype, cancellation));
        }

        return new Result(new FileInfo(file).Length, Median(reads), starts.ToDictionary(entry => entry.Key, entry => new Start(
            Median(entry.Value.Select(start => start.Ready)), Median(entry.Value.Select(start => start.FirstToken)),
            Median(entry.Value.Select(start => start.Resident)), Median(entry.Value.Select(start => start.Highest)))));
    }

    /// <summary>Seconds to read a file once, by one thread, into a buffer that fits the caches.</summary>
    private static double Read(string path)
    {
        byte[] buffer = new byte[1 << 20];
        long begun = Stopwatch.GetTimestamp();
        using FileStream file = new(path, FileMode.Open, FileAccess.Read, FileShare.Read, bufferSize: 0);
        while (file.Read(buffer) > 0)
        {
        }

        return Stopwatch.GetElapsedTime(begun).TotalSeconds;
    }

    private static async Task<Start> StartAsync(string model, string dtype, CancellationToken cancellation)
    {
        long begun = Stopwatch.GetTimestamp();
        await using SidecarProcess server = await SidecarProcess.StartAsync(new SidecarOptions
        {
            Program = typeof(StartUp).Assembly.GetCustomAttributes<AssemblyMetadataAttribute>()
                .Single(attribute => attribute.Key == "RolloutProgram").Value!,
            ModelFolder = model,
            ExtraArguments = ["--max-context", "1024", "--max-sequences", "64", "--dtype", dtype],
            StopTimeout = TimeSpan.FromSeconds(5),
        }, cancellation);
        double ready = Stopwatch.GetElapsedTime(begun).TotalSeconds;
        await using RolloutClient client = server.Connect();
        GenerateOptions one = new() { MaxTokens = 1 };
        await foreach (SampleChunk chunk in client.StreamAsync(s_prompt, one, cancellationToken: cancellation))
        {
            if (chunk.Ids.Length > 0) break;
        }

        double first = Stopwatch.GetElapsedTime(begun).TotalSeconds;
        return new Start(ready, first, StatusBytes(server.ProcessId, "VmRSS:"), StatusBytes(server.ProcessId, "VmHWM:"));
    }

    /// <summary>A line of /proc/PID/status, which counts in kilobytes of 1024.</summary>
    private static long StatusBytes(int process, string name)
    {
        string line = File.ReadLines($"/proc/{process}/status").Single(line => line.StartsWith(name, StringComparison.Ordinal));
        return 1024 * long.Parse(
            line[name.Length..].Replace("kB", "", StringComparison.Ordinal),
            NumberStyles.Any, CultureInfo.InvariantCulture);
    }

    private static void PrintJson(Result result)
    {
        JsonObject json = new() { ["bytes"] = result.Bytes, ["read_s"] = Math.Round(result.Read, 4) };
        foreach ((string dtype, Start start) in result.Starts)
        {
            json[dtype] = new JsonObject
            {
                ["ready_s"] = Math.Round(start.Ready, 4),
                ["first_token_s"] = Math.Round(start.FirstToken, 4),
                ["resident_bytes"] = start.Resident,
                ["highest_resident_bytes"] = start.Highest,
            };
        }

        Console.WriteLine(json.ToJsonString(JsonSerializerOptions.Web));
    }

    private static void PrintTable(Result result)
    {
        Table table = new();
        table.AddColumns("", "ready", "first token", "x reading the file", "resident", "highest");
        foreach ((string dtype, Start start) in result.Starts)
        {
            table.AddRow(dtype, $"{start.Ready:F2} s", $"{start.FirstToken:F2} s", $"{start.FirstToken / result.Read:F1}",
                $"{start.Resident / 1e6:F0} MB", $"{start.Highest / 1e6:F0} MB");
        }

        table.Caption = new TableTitle(
            $"one thread reads the file's {result.Bytes / 1e6:F0} MB in {result.Read:F2} s; "
            + "hardly any keys and values have been touched yet");
        AnsiConsole.Write(table);
    }

    private static T Median<T>(IEnumerable<T> values)
    {
        T[] sorted = [.. values.Order()];
        return sorted[sorted.Length / 2];
    }

    /// <param name="Ready">Seconds from starting the process until it serves.</param>
    /// <param name="FirstToken">Seconds from starting the process until a client has received a token.</param>
    /// <param name="Resident">Bytes, once the first token has come.</param>
    /// <param name="Highest">Peak bytes until then.</param>
    private sealed record Start(double Ready, double FirstToken, long Resident, long Highest);

    private sealed record Result(long Bytes, double Read, Dictionary<string, Start> Starts);
}
