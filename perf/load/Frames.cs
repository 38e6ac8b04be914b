using System.CommandLine;
using System.Diagnostics;
using System.Reflection;
using System.Runtime.InteropServices;
using System.Text.Json;
using Rollout.Client;
using Rollout.Engine;
using Rollout.Kernels;
using Spectre.Console;

namespace Rollout.Load;

/// <summary>
/// The cost of the transport: a model so small that it costs almost nothing is served by another process, alternating with the same
/// requests on the same engine inside this process. Processor seconds are those of whole processes: in process they include engine and
/// reader, over gRPC the server (engine included) and the client are separate.
/// </summary>
internal static class Frames
{
    private const int Sequences = 256;
    private const int PromptTokens = 8;
    private const int SampleTokens = 120; // attention over long contexts would not be negligible
    private const int Vocabulary = 32;
    private const int Waves = 16; // a run fills the batch several times, so that its start and end matter little
    private const int WarmUp = 3;
    private const int MaxContext = PromptTokens + SampleTokens;

    private const string Config = """
        {
          "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
          "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
          "vocab_size": 32, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
          "tie_word_embeddings": true, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2
        }
        """;

    private static readonly Load[] s_loads = [new(16, false), new(1, false), new(16, true), new(1, true)];

    public static Command Create(Option<bool> json, Option<int> repeats)
    {
        Option<int> threads = new("--threads")
        {
            Description = "Threads of the engine's backend. One, for such a model, leaves the other cores to the transport.",
            DefaultValueFactory = _ => 1,
        };
        Command command = new("frames", "Tokens a second, and processor time a token, through gRPC with a model that costs almost nothing.")
        {
            json, repeats, threads,
        };
        command.SetAction(async (arguments, cancellation) =>
        {
            List<Result> results = await MeasureAsync(arguments.GetValue(threads), arguments.GetValue(repeats), cancellation);
            if (arguments.GetValue(json)) PrintJson(results);
            else PrintTable(results);
            return 0;
        });
        return command;
    }

    private static async Task<List<Result>> MeasureAsync(int threads, int repeats, CancellationToken cancellation)
    {
        string folder = Directory.CreateTempSubdirectory("rollout-load-").FullName;
        try
        {
            WriteModel(folder);
            await using SidecarProcess sidecar = await SidecarProcess.StartAsync(new SidecarOptions
            {
                Program = typeof(Frames).Assembly.GetCustomAttributes<AssemblyMetadataAttribute>()
                    .Single(attribute => attribute.Key == "RolloutProgram").Value!,
                ModelFolder = folder,
                Threads = threads,
                ExtraArguments = ["--max-context", $"{MaxContext}", "--max-sequences", $"{Sequences}"],
            }, cancellation);
            await using RolloutClient client = sidecar.Connect();
            await using RolloutEngine engine = RolloutEngine.Load(folder, new CpuBackend(threads),
                new EngineOptions { MaxContext = MaxContext, MaxSequences = Sequences });
            using Process server = Process.GetProcessById(sidecar.ProcessId);

            List<Result> results = [];
            foreach (Load load in s_loads)
            {
                List<Run> inProcess = [], remote = [];
                for (int i = -WarmUp; i < repeats; i++)
                {
                    Run here = await MeasureAsync(server, () => InProcessAsync(engine, load, cancellation));
                    Run there = await MeasureAsync(server, () => RemoteAsync(client, load, cancellation));
                    if (i < 0) continue; // warm-up: includes compilation
                    inProcess.Add(here);
                    remote.Add(there);
                }

                results.Add(new Result(load,
                    Median(inProcess, run => run.TokensPerSecond), Median(inProcess, run => run.OwnMicroseconds),
                    Median(remote, run => run.TokensPerSecond), Median(remote, run => run.ServerMicroseconds),
                    Median(remote, run => run.OwnMicroseconds)));
            }

            return results;
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    private static async Task<Run> MeasureAsync(Process server, Func<Task<long>> work)
    {
        (TimeSpan own, TimeSpan servers) = (Environment.CpuUsage.TotalTime, Processor(server));
        long started = Stopwatch.GetTimestamp();
        long tokens = await work();
        double seconds = Stopwatch.GetElapsedTime(started).TotalSeconds;
        const int Expected = Waves * Sequences * SampleTokens;
        if (tokens != Expected) throw new InvalidOperationException($"{tokens} tokens arrived, {Expected} were requested");
        return new Run(tokens / seconds, (Environment.CpuUsage.TotalTime - own).TotalMicroseconds / tokens,
            (Processor(server) - servers).TotalMicroseconds / tokens);
    }

    private static TimeSpan Processor(Process process)
    {
        process.Refresh();
        return process.TotalProcessorTime;
    }

    private static Task<long> InProcessAsync(RolloutEngine engine, Load load, CancellationToken cancellation)
        => ReadersAsync(load, async group =>
        {
            long tokens = 0;
            Group samples = engine.Submit(new GroupRequest
            {
                Id = $"{group}",
                Prompt = Prompt(group),
                N = load.N,
                Seed = (ulong)group,
                MaxTokens = SampleTokens,
                IgnoreEos = true,
                StreamTokens = load.Streaming,
            });
            await foreach (Engine.SequenceChunk chunk in samples.ReadAsync(cancellation)) tokens += chunk.End - chunk.Start;
            return tokens;
        });

    private static async Task<long> RemoteAsync(RolloutClient client, Load load, CancellationToken cancellation)
    {
        long tokens = 0;
        if (load.Streaming)
        {
            return await ReadersAsync(load, async group =>
            {
                long read = 0;
                await foreach (Client.SampleChunk chunk in client.StreamAsync(Request(load, group), cancellationToken: cancellation))
                    read += chunk.Ids.Length;
                return read;
            });
        }

        IEnumerable<RolloutRequest> all = Enumerable.Range(0, Waves * Sequences / load.N).Select(group => Request(load, group));
        await foreach (Sample sample in client.GenerateBatchAsync(all, cancellationToken: cancellation)) tokens += sample.Ids.Length;
        return tokens;
    }

    /// <summary>A streamed group begins when the previous one has ended; groups delivered whole are all requested at once.</summary>
    private static async Task<long> ReadersAsync(Load load, Func<int, Task<long>> read)
    {
        int atOnce = Sequences / load.N * (load.Streaming ? 1 : Waves), each = load.Streaming ? Waves : 1;
        long[] tokens = await Task.WhenAll(Enumerable.Range(0, atOnce).Select(async reader =>
        {
            long sum = 0;
            for (int i = 0; i < each; i++) sum += await read((i * atOnce) + reader);
            return sum;
        }));
        return tokens.Sum();
    }

    private static RolloutRequest Request(Load load, int group) => new(Prompt(group), new GenerateOptions
    {
        N = load.N,
        Seed = (ulong)group,
        MaxTokens = SampleTokens,
        IgnoreEos = true,
    });

    private static int[] Prompt(int group)
    {
        Random random = new(group);
        return [.. Enumerable.Range(0, PromptTokens).Select(_ => random.Next(Vocabulary))];
    }

    private static void WriteModel(string folder)
    {
        File.WriteAllText(Path.Combine(folder, "config.json"), Config);
        TensorDeclaration[] tensors = [.. ModelSpec.Load(folder).CheckpointTensors()
            .Select(t => new TensorDeclaration(t.Name, DType.BFloat16, t.Shape))];
        using SafetensorsWriter writer = new(Path.Combine(folder, "model.safetensors"), tensors);
        Random random = new(1);
        foreach (TensorDeclaration tensor in tensors)
        {
            ushort[] values = new ushort[tensor.Bytes / 2];
            foreach (ref ushort value in values.AsSpan())
                value = (ushort)(BitConverter.SingleToUInt32Bits(random.NextSingle() - 0.5f) >> 16);
            writer.Write(MemoryMarshal.AsBytes(values.AsSpan()));
        }

        writer.Complete();
    }

    private static double Median(List<Run> runs, Func<Run, double> value) => runs.Select(value).Order().ElementAt(runs.Count / 2);

    private static void PrintJson(List<Result> results) => Console.WriteLine(JsonSerializer.Serialize(results.Select(result => new
    {
        groups = Sequences / result.Load.N,
        n = result.Load.N,
        streaming = result.Load.Streaming,
        in_process_tokens_per_second = Math.Round(result.InProcess),
        in_process_cpu_us_per_token = Math.Round(result.InProcessMicroseconds, 3),
        grpc_tokens_per_second = Math.Round(result.Grpc),
        server_cpu_us_per_token = Math.Round(result.ServerMicroseconds, 3),
        client_cpu_us_per_token = Math.Round(result.ClientMicroseconds, 3),
    })));

    private static void PrintTable(List<Result> results)
    {
        Table table = new()
        {
            Title = new TableTitle($"A model that costs almost nothing, {Sequences} sequences, {SampleTokens} tokens each"),
        };
        table.AddColumns(
            "groups x n", "replies", "in process, tokens/s", "CPU us/token", "gRPC, tokens/s", "server us/token", "client us/token");
        foreach (Result result in results)
        {
            table.AddRow($"{Sequences / result.Load.N} x {result.Load.N}", result.Load.Streaming ? "as tokens come" : "whole samples",
                $"{result.InProcess:N0}", $"{result.InProcessMicroseconds:F2}",
                $"{result.Grpc:N0}", $"{result.ServerMicroseconds:F2}", $"{result.ClientMicroseconds:F2}");
        }

        AnsiConsole.Write(table);
    }

    private sealed record Load(int N, bool Streaming);

    private sealed record Run(double TokensPerSecond, double OwnMicroseconds, double ServerMicroseconds);

    /// <summary>Medians.</summary>
    private sealed record Result(
        Load Load, double InProcess, double InProcessMicroseconds, double Grpc, double ServerMicroseconds, double ClientMicroseconds);
}
