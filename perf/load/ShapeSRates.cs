using System.Diagnostics;
using Rollout.Engine;
using Rollout.Kernels;

namespace Rollout.Load;

/// <summary>Prefill and decode rates of Shape S in process, and of llama.cpp's batched bench on the same work.</summary>
internal static class ShapeSRates
{
    private const int PromptTokens = 128;
    private const int DecodeSteps = 32;
    private const int PrefillTokens = 256;

    /// <summary>
    /// Every round runs every storage format and every peer on it, one after the other, so that noise affects all equally; a number is the
    /// median of the rounds.
    /// </summary>
    public static async Task<ShapeSResult> MeasureAsync(ShapeSWork work, IProgress<string> progress)
    {
        string folder = ShapeS.Folder();
        double gflops = 0, gbps = 0; // the best of the rounds: the machine's limit, not what other processes left of it at one moment
        Dictionary<string, List<Throughput>> runs = [];
        Dictionary<WeightFormat, float[]> logProbs = [];
        string[] ggufs = [.. work.Formats.Select(GgufOf).Distinct()];
        for (int round = 1; round <= work.Repetitions; round++)
        {
            progress.Report($"round {round} of {work.Repetitions}: machine limits");
            gflops = Math.Max(gflops, MachineLimits.MeasureFmaGflops(work.Threads));
            gbps = Math.Max(gbps, MachineLimits.MeasureReadGBps(work.Threads));
            foreach (WeightFormat format in work.Formats)
            {
                string name = WeightFormats.NameOf(format);
                progress.Report($"round {round} of {work.Repetitions}: {name}");
                Add(name, await MeasureAsync(folder, format, work, logProbs));
            }

            foreach ((string gguf, BatchedBench peer) in ggufs.SelectMany(gguf => work.Peers.Select(peer => (gguf, peer))))
            {
                progress.Report($"round {round} of {work.Repetitions}: {peer.Label} {gguf}");
                Add($"{peer.Label} {gguf}", peer.Measure(Gguf.Of(folder, gguf), work.Batches, PromptTokens, DecodeSteps, PrefillTokens));
            }
        }

        return new ShapeSResult(runs.ToDictionary(run => run.Key, run => Throughput.Median(run.Value)), gflops, gbps, Errors(logProbs));

        void Add(string name, Throughput throughput)
        {
            if (!runs.TryGetValue(name, out List<Throughput>? list)) runs[name] = list = [];
            list.Add(throughput);
        }
    }

    /// <summary>The peers' counterpart of a format.</summary>
    public static string GgufOf(WeightFormat format) => format == WeightFormat.Int8 ? "q8_0" : "bf16";

    /// <summary>One round of one format.</summary>
    private static async Task<Throughput> MeasureAsync(
        string folder, WeightFormat format, ShapeSWork work, Dictionary<WeightFormat, float[]> logProbs)
    {
        await using RolloutEngine engine = RolloutEngine.Load(folder, new CpuBackend(work.Threads, format: format),
            new EngineOptions { MaxContext = 1024, MaxSequences = 64, MaxBatchTokens = 512 });
        if (!logProbs.ContainsKey(format)) logProbs[format] = await ScoreAsync(engine);

        await TimeAsync(engine, 1, PrefillTokens, maxTokens: 1, salt: "warm-up"); // warm-up: includes compilation
        double prefill = PrefillTokens / await TimeAsync(engine, 1, PrefillTokens, maxTokens: 1, salt: "prefill");
        SortedDictionary<int, double> decode = [];
        foreach (int batch in work.Batches)
        {
            // With the prompts cached, a run is one short step and then decode steps; the difference of two lengths is decode alone.
            await TimeAsync(engine, batch, PromptTokens, maxTokens: 2, salt: "decode");
            double one = await TimeAsync(engine, batch, PromptTokens, maxTokens: 1, salt: "decode");
            double all = await TimeAsync(engine, batch, PromptTokens, maxTokens: 1 + DecodeSteps, salt: "decode");
            decode[batch] = batch * DecodeSteps / (all - one);
        }

        return new Throughput(prefill, decode);
    }

    /// <summary>Log-probabilities of random tokens, the same for every format.</summary>
    private static async Task<float[]> ScoreAsync(RolloutEngine engine)
    {
        Random random = new(3);
        Group group = engine.Submit(new GroupRequest
        {
            Id = "score",
            Prompt = [.. Enumerable.Range(0, 512).Select(_ => random.Next(ShapeS.Vocabulary))],
            MaxTokens = 0,
            PromptLogProbs = true,
        });
        await group.Completed;
        return [.. group.PromptLogProbs];
    }

    private static Dictionary<string, LogProbError> Errors(Dictionary<WeightFormat, float[]> logProbs)
    {
        Dictionary<string, LogProbError> errors = [];
        if (!logProbs.TryGetValue(WeightFormat.BFloat16, out float[]? exact)) return errors;
        foreach ((WeightFormat format, float[] values) in logProbs.Where(entry => entry.Key != WeightFormat.BFloat16))
        {
            double[] off = [.. exact.Zip(values, (a, b) => (double)Math.Abs(a - b))];
            errors[WeightFormats.NameOf(format)] = new LogProbError(off.Average(), off.Max());
        }

        return errors;
    }

    /// <summary>Seconds until all of <paramref name="groups"/> different prompts have their tokens.</summary>
    private static async Task<double> TimeAsync(RolloutEngine engine, int groups, int promptTokens, int maxTokens, string salt)
    {
        long started = Stopwatch.GetTimestamp();
        Group[] all = new Group[groups];
        for (int i = 0; i < groups; i++)
        {
            Random random = new(i);
            all[i] = engine.Submit(new GroupRequest
            {
                Id = $"{i}",
                Prompt = [.. Enumerable.Range(0, promptTokens).Select(_ => random.Next(ShapeS.Vocabulary))],
                MaxTokens = maxTokens,
                Seed = (ulong)i,
                IgnoreEos = true,
                CacheSalt = salt,
            });
        }

        foreach (Group group in all) await group.Completed;
        double seconds = Stopwatch.GetElapsedTime(started).TotalSeconds;
        Sequence? failed = all.SelectMany(group => group.Sequences).FirstOrDefault(sample => sample.Published != maxTokens);
        return failed is null
            ? seconds
            : throw new InvalidOperationException($"a sample ended early: {failed.FinishReason} {failed.Error}");
    }
}

/// <summary>What to measure.</summary>
/// <param name="Formats">Storage formats, each measured with the peers' counterpart.</param>
/// <param name="Batches">Batch sizes to decode at.</param>
/// <param name="Threads">Cores of each program.</param>
/// <param name="Repetitions">Rounds.</param>
/// <param name="Peers">Run beside Rollout.</param>
internal sealed record ShapeSWork(
    IReadOnlyList<WeightFormat> Formats, IReadOnlyList<int> Batches, int Threads, int Repetitions, IReadOnlyList<BatchedBench> Peers);

/// <summary>Medians.</summary>
/// <param name="Runs">Rollout's by format, then "PEER bf16", "PEER q8_0".</param>
/// <param name="FmaGflops">The machine's fp32 limit, from the same run.</param>
/// <param name="ReadGBps">The machine's read bandwidth, from the same run.</param>
/// <param name="LogProbErrors">By format, where bf16 ran too.</param>
internal sealed record ShapeSResult(
    IReadOnlyDictionary<string, Throughput> Runs, double FmaGflops, double ReadGBps,
    IReadOnlyDictionary<string, LogProbError> LogProbErrors);

/// <summary>How far a format's log-probabilities are from those of bf16, in nats, over 511 random tokens.</summary>
internal sealed record LogProbError(double Mean, double Worst);
