using System.CommandLine;
using System.Text.Json;
using System.Text.Json.Nodes;
using Rollout.Client;
using Rollout.Kernels;
using Spectre.Console;

namespace Rollout.Load.Bench;

/// <summary>`bench fixed`, `bench grpo`, `bench open`: Shape S served under realistic patterns of requests.</summary>
internal static class BenchCommand
{
    private const int Slots = 64;           // sequences at a time, Rollout's and the peer's
    private const int ContextOfEach = 512;  // prompts to 256, samples to 256

    public static Command Create(Option<bool> json)
    {
        Option<int> batch = new("--batch") { Description = "Sequences.", DefaultValueFactory = _ => 32 };
        Option<int> prompts = new("--prompts") { Description = "Prompts of a step.", DefaultValueFactory = _ => 16 };
        Option<int> samples = new("--samples") { Description = "Samples of a prompt.", DefaultValueFactory = _ => 8 };
        Option<double> rate = new("--rate") { Description = "Requests a second.", DefaultValueFactory = _ => 1 };
        Option<int> count = new("--count") { Description = "Requests.", DefaultValueFactory = _ => 30 };
        Command bench = new(
            "bench", "Serves Shape S under a pattern of requests: in a sidecar, in process, and by a llama.cpp server.");
        Common common = new(json);
        bench.Add(common.Command("fixed", "A batch that starts together: 128-token prompts, 64 tokens each.", [batch],
            arguments => Arrivals.Fixed(arguments.GetValue(batch), arguments.GetValue(common.Seed))));
        bench.Add(common.Command("grpo", "A GRPO step: groups of one prompt, log-normal lengths to 256.", [prompts, samples],
            arguments => Arrivals.Grpo(arguments.GetValue(prompts), arguments.GetValue(samples), arguments.GetValue(common.Seed))));
        bench.Add(common.Command("open", "Poisson arrivals at a rate, whether or not the server keeps up.", [rate, count],
            arguments => Arrivals.Open(arguments.GetValue(rate), arguments.GetValue(count), arguments.GetValue(common.Seed))));
        return bench;
    }

    private static async Task<BenchResults> MeasureAsync(BenchWork work, IProgress<string> progress, CancellationToken cancellation)
    {
        string model = ShapeS.Folder();
        (Arrival[] arrivals, string dtype, int threads, int repeats, double updatesEvery, string? peer) = work;
        int sequences = Math.Min(Slots, arrivals.Length);
        Dictionary<string, List<BenchResult>> runs = [];
        IReadOnlyList<TensorSource> tensors = updatesEvery > 0 ? BackgroundUpdates.Read(model) : [];
        List<PushTimings> pushes = [];

        // One at a time, so that none holds memory or cores while another is measured; in rounds, so that noise affects all equally.
        for (int round = 0; round < repeats; round++)
        {
            progress.Report($"round {round + 1} of {repeats}: rollout");
            await using (SidecarTarget sidecar = await SidecarTarget.StartAsync(model, dtype, threads, sequences, cancellation))
            {
                using CancellationTokenSource enough = new();
                Task<List<PushTimings>>? updates = null;
                await PlayAsync(sidecar, () =>
                {
                    sidecar.Forget();
                    if (updatesEvery > 0)
                        updates = BackgroundUpdates.RunAsync(sidecar.Client, tensors, TimeSpan.FromSeconds(updatesEvery), enough.Token);
                });
                enough.Cancel();
                if (updates is not null) pushes.AddRange(await updates);
            }

            progress.Report($"round {round + 1} of {repeats}: in process");
            await using (InProcessTarget inProcess = new(model, WeightFormats.Parse(dtype), threads, sequences))
                await PlayAsync(inProcess, inProcess.Forget);
            if (peer is null) continue;
            progress.Report($"round {round + 1} of {repeats}: llama-server");
            string gguf = Gguf.Of(model, ShapeSRates.GgufOf(WeightFormats.Parse(dtype)));
            await using LlamaServerTarget server = await LlamaServerTarget.StartAsync(
                peer, gguf, threads, sequences, ContextOfEach, cancellation);
            await PlayAsync(server, () => { }); // warm-up prompts are its own, so the cache holds none of the run's
        }

        return new BenchResults(new(runs.ToDictionary(run => run.Key, run => BenchResult.Median(run.Value))), pushes);

        async Task PlayAsync(ITarget target, Action begin)
        {
            await BenchRun.PlayAsync(target, Arrivals.Fixed(2, seed: -1), cancellation); // warm-up: includes compilation
            begin();
            if (!runs.TryGetValue(target.Name, out List<BenchResult>? list)) runs[target.Name] = list = [];
            list.Add(await BenchRun.PlayAsync(target, arrivals, cancellation));
        }
    }

    private static void PrintJson(BenchResults results)
    {
        JsonObject json = [];
        foreach ((string name, BenchResult result) in results.Targets)
        {
            json[name] = new JsonObject
            {
                ["tokens_per_s"] = Math.Round(result.TokensPerSecond, 1),
                ["first_token_p50_s"] = Math.Round(result.FirstP50, 4),
                ["first_token_p99_s"] = Math.Round(result.FirstP99, 4),
                ["inter_token_p50_s"] = Math.Round(result.GapP50, 5),
                ["inter_token_p99_s"] = Math.Round(result.GapP99, 5),
                ["seconds"] = Math.Round(result.Seconds, 2),
            };
        }

        if (results.Pushes.Count > 0)
        {
            json["updates"] = new JsonObject
            {
                ["count"] = results.Pushes.Count,
                ["push_p50_s"] = Math.Round(results.Push(0.5), 4),
                ["stall_p50_s"] = Math.Round(results.Stall(0.5), 5),
                ["stall_max_s"] = Math.Round(results.Stall(1), 5),
            };
        }

        Console.WriteLine(json.ToJsonString(JsonSerializerOptions.Web));
    }

    private static void PrintTable(BenchResults results)
    {
        double own = results.Targets["rollout"].TokensPerSecond;
        Table table = new();
        table.AddColumns("", "tokens/s", "rollout is", "first token p50 / p99", "between tokens p50 / p99", "seconds");
        foreach ((string name, BenchResult result) in results.Targets)
        {
            table.AddRow(
                name, $"{result.TokensPerSecond:F1}", $"{own / result.TokensPerSecond:F2}x",
                $"{result.FirstP50:F2} / {result.FirstP99:F2} s",
                $"{result.GapP50 * 1e3:F1} / {result.GapP99 * 1e3:F1} ms", $"{result.Seconds:F1}");
        }

        if (results.Pushes.Count > 0)
        {
            table.Caption = new TableTitle(
                $"{results.Pushes.Count} weight updates of rollout meanwhile: a push took {results.Push(0.5):F2} s, "
                + $"no step could run for {results.Stall(0.5) * 1e3:F2} ms (median), {results.Stall(1) * 1e3:F2} ms (worst)");
        }

        AnsiConsole.Write(table);
    }

    /// <param name="Arrivals">The samples to request.</param>
    /// <param name="DType">Weight format.</param>
    /// <param name="Threads">Cores of each server.</param>
    /// <param name="Repeats">Rounds.</param>
    /// <param name="UpdatesEvery">Seconds between weight updates of the sidecar; 0: none.</param>
    /// <param name="Peer">A llama-server, or none.</param>
    private sealed record BenchWork(Arrival[] Arrivals, string DType, int Threads, int Repeats, double UpdatesEvery, string? Peer);

    /// <param name="Targets">Medians by server.</param>
    /// <param name="Pushes">Of all rounds.</param>
    private sealed record BenchResults(SortedDictionary<string, BenchResult> Targets, List<PushTimings> Pushes)
    {
        /// <summary>Seconds from a push's begin to the reply that its weights are served.</summary>
        public double Push(double quantile) => BenchRun.At([.. Pushes.Select(push => push.Total).Order()], quantile);

        /// <summary>Seconds in which the server could run no step.</summary>
        public double Stall(double quantile) => BenchRun.At([.. Pushes.Select(push => push.ServerStall).Order()], quantile);
    }

    /// <summary>Options of all patterns.</summary>
    private sealed class Common
    {
        private readonly Option<bool> _json;

        private readonly Option<string> _dtype = new("--dtype")
        {
            Description = "Weight format.",
            DefaultValueFactory = _ => WeightFormats.CpuNames[0],
        };

        private readonly Option<int> _threads = new("--threads")
        {
            Description = "Cores to use.",
            DefaultValueFactory = _ => Environment.ProcessorCount,
        };

        private readonly Option<int> _repeats = new("--repeats")
        {
            Description = "Rounds a number is the median of.",
            DefaultValueFactory = _ => 3,
        };

        private readonly Option<string?> _peer = new("--peer")
        {
            Description = "llama-server=PATH: the same requests against a llama.cpp server.",
            HelpName = "llama-server=PATH",
        };

        public Common(Option<bool> json)
        {
            _json = json;
            _dtype.AcceptOnlyFromAmong(WeightFormats.CpuNames);
            RequirePositive(_threads);
            RequirePositive(_repeats);
            _updatesEvery.Validators.Add(result =>
            {
                if (!(result.GetValueOrDefault<double>() >= 0)) result.AddError("--updates-every: must not be negative");
            });
            _peer.Validators.Add(result =>
            {
                string peer = result.GetValueOrDefault<string>() ?? "";
                if (!peer.StartsWith("llama-server=", StringComparison.Ordinal) || !File.Exists(PathOf(peer)))
                    result.AddError($"--peer: '{peer}' is not llama-server=PATH of a program that exists");
            });
        }

        private readonly Option<double> _updatesEvery = new("--updates-every")
        {
            Description = "Seconds between weight updates of the sidecar while it draws; 0: none.",
            DefaultValueFactory = _ => 0,
        };

        public Option<int> Seed { get; } = new("--seed")
        {
            Description = "Seed of prompts, lengths and arrivals.",
            DefaultValueFactory = _ => 1,
        };

        public Command Command(string name, string description, Option[] own, Func<ParseResult, Arrival[]> arrivals)
        {
            Command command = new(name, description) { _json, _dtype, _threads, _repeats, _updatesEvery, _peer, Seed };
            foreach (Option option in own) command.Add(option);
            foreach (Option option in own) RequirePositive(option);
            command.SetAction(async (arguments, cancellation) =>
            {
                BenchWork work = new(
                    arrivals(arguments), arguments.GetValue(_dtype)!, arguments.GetValue(_threads), arguments.GetValue(_repeats),
                    arguments.GetValue(_updatesEvery), arguments.GetValue(_peer) is { } peer ? PathOf(peer) : null);
                if (arguments.GetValue(_json))
                {
                    PrintJson(await MeasureAsync(work, new Progress<string>(), cancellation));
                    return 0;
                }

                PrintTable(await AnsiConsole.Status().StartAsync(name, status =>
                    MeasureAsync(work, new Progress<string>(text => status.Status(text)), cancellation)));
                return 0;
            });
            return command;
        }

        private static void RequirePositive(Option option) => option.Validators.Add(result =>
        {
            bool wrong = option is Option<double> ? !(result.GetValueOrDefault<double>() > 0) : result.GetValueOrDefault<int>() < 1;
            if (wrong) result.AddError($"{option.Name}: must be greater than 0");
        });

        private static string PathOf(string peer) => peer[(peer.IndexOf('=', StringComparison.Ordinal) + 1)..];
    }
}
