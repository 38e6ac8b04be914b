using System.Diagnostics;
using System.Text.Json;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;

namespace Rollout.Gpu;

/// <summary>Stage 2: the golden models, the CUDA tests, and NVIDIA's checkers on a small model.</summary>
internal static class Correctness
{
    public const string Tests = "Tests";
    private const string Golden = "Goldens";

    public static IReadOnlyList<Part> Parts { get; } =
    [
        new("goldens", 45, GoldensAsync),
        new("tests of kernels", 90, stage => TestsAsync(stage, "kernels", "Rollout.Kernels.Tests",
            stage.IsSmall ? ["-class", "Rollout.Kernels.Tests.Cuda.PeersTests"] : ["-namespace", "Rollout.Kernels.Tests.Cuda"])),
        new("tests of the engine", 90, stage => TestsAsync(stage, "engine", "Rollout.Engine.Tests",
            stage.IsSmall ? ["-method", "*.CudaTests.In_fp32_greedy_*"] : ["-class", "Rollout.Engine.Tests.CudaTests"])),
        new("memcheck", 40, stage => SanitizeAsync(stage, "memcheck")),
        new("racecheck", 40, stage => SanitizeAsync(stage, "racecheck")),
    ];

    /// <summary>
    /// Log-probabilities of the tokens of the reference (Hugging Face, fp32), and greedy tokens compared with its own, in both formats.
    /// </summary>
    private static async Task GoldensAsync(Stage stage)
    {
        foreach (string family in (string[])["llama", "llama3", "qwen2", "qwen3"])
        {
            foreach (WeightFormat format in (WeightFormat[])[WeightFormat.Float32, WeightFormat.BFloat16])
            {
                string name = $"ours, {WeightFormats.NameOf(format)}";
                await stage.TryAsync(Golden, family, async () =>
                {
                    GoldenFile golden = GoldenFile.Read(family);
                    await using RolloutEngine engine = RolloutEngine.Load(Shapes.GoldenFolder(family), new CudaBackend(0, format),
                        new EngineOptions { MaxBatchTokens = 64, MaxSequences = 8, MaxContext = 128 });
                    List<double> differences = [];
                    int same = 0, tokens = 0;
                    for (int i = 0; i < golden.Prompts.Length; i++)
                    {
                        (int[] prompt, Continuation continuation) = (golden.Prompts[i], golden.Continuations[i]);
                        Group score = engine.Submit(new GroupRequest
                        {
                            Id = $"score {i}",
                            Prompt = [.. prompt, .. continuation.Tokens],
                            MaxTokens = 0,
                            PromptLogProbs = true,
                        });
                        Group greedy = engine.Submit(new GroupRequest
                        {
                            Id = $"greedy {i}",
                            Prompt = prompt,
                            Temperature = 0,
                            IgnoreEos = true,
                            MaxTokens = continuation.Tokens.Length,
                        });
                        await Task.WhenAll(score.Completed, greedy.Completed);
                        for (int t = 0; t < continuation.Tokens.Length; t++)
                            differences.Add(Math.Abs(continuation.LogProbs[t] - score.PromptLogProbs[prompt.Length - 1 + t]));
                        tokens += continuation.Tokens.Length;
                        same += continuation.Tokens.AsSpan().CommonPrefixLength(
                            greedy.Sequences[0].Tokens(0, greedy.Sequences[0].Published));
                    }

                    bool exact = format == WeightFormat.Float32;
                    stage.Write(Golden, family, $"{name}: mean |dlogp|", differences.Average(), exact ? 1e-4 : null);
                    stage.Write(Golden, family, $"{name}: largest", differences.Max(), exact ? 1e-3 : null);
                    stage.Write(Golden, family, $"{name}: greedy tokens until one differs", $"{same} of {tokens}");
                });
            }
        }
    }

    /// <summary>Runs a test program of the archive; one row per test.</summary>
    private static async Task TestsAsync(Stage stage, string folder, string program, string[] filter)
    {
        string dll = Path.Combine(Stage.Root, "tests", folder, $"{program}.dll");
        ProcessStartInfo info = new(
            Environment.ProcessPath!, [dll, "-reporter", "json", "-noColor", "-noAutoReporters", "-parallelMode", "none", .. filter])
        {
            RedirectStandardOutput = true,
        };
        if (!stage.IsSmall) info.Environment["ROLLOUT_TEST_CUDA"] = "real";
        using Process process = Process.Start(info)!;
        Dictionary<string, string> names = [];
        bool ended = false;
        while (await process.StandardOutput.ReadLineAsync() is { } line)
        {
            if (!line.StartsWith('{'))
            {
                await Console.Error.WriteLineAsync(line);
                continue;
            }

            using JsonDocument json = JsonDocument.Parse(line);
            JsonElement message = json.RootElement;
            string type = Text(message, "$type");
            if (type == "test-starting")
            {
                names[Text(message, "TestUniqueID")] =
                    Text(message, "TestDisplayName").Replace($"{program}.", "", StringComparison.Ordinal);
            }
            else if (type is "test-passed" or "test-skipped" or "test-failed")
            {
                Record(message, type["test-".Length..]);
            }

            ended |= type == "test-assembly-finished";
        }

        await process.WaitForExitAsync();
        if (!ended) throw new InvalidOperationException($"{program} ended with {process.ExitCode} before its tests had");

        void Record(JsonElement message, string result)
        {
            string name = names[Text(message, "TestUniqueID")];
            if (result == "failed")
                stage.Fail(Tests, name, string.Join(" | ", message.GetProperty("Messages").EnumerateArray()));
            else
                stage.Write(Tests, name, "result", result);
        }

        static string Text(JsonElement message, string property) => message.GetProperty(property).GetString()!;
    }

    /// <summary>Runs a small model under compute-sanitizer, where that is installed.</summary>
    private static async Task SanitizeAsync(Stage stage, string tool)
    {
        string? program = Programs.Find("compute-sanitizer");
        if (program is null || stage.IsSmall)
        {
            if (stage.IsSmall) await SmallAsync(); // the program that the checker runs
            stage.Write("compute-sanitizer", tool, "result", program is null ? "not installed" : "not for the simulated device");
            return;
        }

        ProcessStartInfo info = new(
            program, ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20", Environment.ProcessPath!, .. Stage.Self, "small"])
        {
            RedirectStandardOutput = true,
        };
        using Process process = Process.Start(info)!;
        string last = "";
        while (await process.StandardOutput.ReadLineAsync() is { } line)
        {
            await Console.Error.WriteLineAsync(line);
            if (line.Length > 0) last = line;
        }

        await process.WaitForExitAsync();
        if (process.ExitCode == 0) stage.Write("compute-sanitizer", tool, "result", last);
        else stage.Fail("compute-sanitizer", tool, $"ended with {process.ExitCode}: {last}");
    }

    /// <summary>
    /// Runs every kernel of a step once: prompts split over steps, shared keys and values, alternatives, biases, truncation; in both
    /// formats.
    /// </summary>
    public static async Task SmallAsync()
    {
        foreach (WeightFormat format in (WeightFormat[])[WeightFormat.BFloat16, WeightFormat.Float32])
        {
            await using RolloutEngine engine = RolloutEngine.Load(Shapes.GoldenFolder("qwen3"), new CudaBackend(0, format),
                new EngineOptions { MaxBatchTokens = 96, MaxSequences = 8, MaxContext = 256 });
            Group group = engine.Submit(new GroupRequest
            {
                Id = "small",
                Prompt = [.. Enumerable.Range(3, 150)],
                N = 3,
                MaxTokens = 6,
                TopK = 50,
                TopP = 0.9f,
                TopLogProbs = 4,
                LogitBias = new Dictionary<int, float> { [5] = 1 },
                IgnoreEos = true,
            });
            await group.Completed;
            if (group.Sequences.Any(sample => sample.Published != 6))
                throw new InvalidOperationException($"the small model's samples: {group.Sequences[0].Error}");
        }
    }

    private sealed record GoldenFile(int[][] Prompts, Continuation[] Continuations)
    {
        private static readonly JsonSerializerOptions s_json = new(JsonSerializerDefaults.Web);

        public static GoldenFile Read(string family)
            => JsonSerializer.Deserialize<GoldenFile>(File.ReadAllText(Path.Combine(Shapes.GoldenFolder(family), "golden.json")), s_json)!;
    }

    private sealed record Continuation(int[] Tokens, float[] LogProbs);
}
