using System.Globalization;
using Rollout.Engine;
using Rollout.Kernels;
using Rollout.Load;

namespace Rollout.Micro;

/// <summary>
/// The time of Shape S's steps by part, compared with the machine's minimum: the tables of perf/ROOFLINE.md. The engine runs as in the
/// server, on a backend that records the time of each part.
/// </summary>
internal static class Roofline
{
    private const int PromptTokens = 64;
    private const int PrefillTokens = 256;
    private const int PrefillSteps = 7;
    private const int DecodeSteps = 32;

    private static readonly int[] s_batches = [1, 8, 32];

    public static async Task PrintAsync(int threads, TextWriter text)
    {
        RecordingBackend backend = new(new CpuBackend(threads));
        await using RolloutEngine engine = RolloutEngine.Load(ShapeS.Folder(), backend,
            new EngineOptions { MaxContext = 1024, MaxSequences = 64, MaxBatchTokens = 512 });

        text.WriteLine(string.Create(CultureInfo.InvariantCulture,
            $"{backend.Name}. FMA peak {Machine.FlopsPerSecond / 1e9:F0} GFLOP/s, read {Machine.BytesPerSecond / 1e9:F1} GB/s."));
        foreach (int batch in s_batches)
        {
            await Console.Error.WriteLineAsync($"decode, batch {batch}");
            // With the prompts cached, what follows the first step is decode alone.
            await RunAsync(engine, batch, PromptTokens, maxTokens: 1, "decode");
            StepRecord[] steps = await RecordAsync(backend, () => RunAsync(engine, batch, PromptTokens, 2 + DecodeSteps, "decode"),
                step => step.Rows == batch && step.Sequences == batch && step.Outputs == batch);
            PrintTable(text, $"Decode, batch {batch}, context {PromptTokens} to {PromptTokens + DecodeSteps}", engine.Model, steps);
        }

        StepRecord[] prefills = await RecordAsync(backend, async () =>
        {
            for (int i = 0; i <= PrefillSteps; i++) await RunAsync(engine, 1, PrefillTokens, maxTokens: 1, $"prefill {i}");
        }, step => step.Rows == PrefillTokens);
        PrintTable(text, $"Prefill, {PrefillTokens} tokens", engine.Model, prefills);
    }

    private static async Task<StepRecord[]> RecordAsync(RecordingBackend backend, Func<Task> run, Func<StepRecord, bool> wanted)
    {
        backend.Clear();
        backend.Recording = true;
        await run();
        backend.Recording = false;
        // The first step includes cold caches, sleeping threads and the time before the request arrived.
        StepRecord[] steps = [.. backend.Records.Where(wanted).Skip(1)];
        return steps.Length > 0 ? steps : throw new InvalidOperationException("no step of the wanted shape ran");
    }

    private static async Task RunAsync(RolloutEngine engine, int groups, int promptTokens, int maxTokens, string salt)
    {
        // All are queued before the first step, so that every step has all of them.
        await engine.PauseAsync(PauseMode.Keep, "roofline", TimeSpan.FromMinutes(1));
        Group[] all = [.. Enumerable.Range(0, groups).Select(i =>
        {
            Random random = new(i);
            return engine.Submit(new GroupRequest
            {
                Id = $"{i}",
                Prompt = [.. Enumerable.Range(0, promptTokens).Select(_ => random.Next(Workload.Vocabulary))],
                MaxTokens = maxTokens,
                Seed = (ulong)i,
                IgnoreEos = true,
                CacheSalt = salt,
            });
        })];
        await engine.ResumeAsync();
        foreach (Group group in all) await group.Completed;
    }

    private static void PrintTable(TextWriter text, string title, ModelSpec model, StepRecord[] steps)
    {
        text.WriteLine();
        text.WriteLine($"### {title}");
        text.WriteLine();
        text.WriteLine("| part | GFLOP | weights and KV, MB | activations, MB | floor, ms | measured, ms | of floor | of step |");
        text.WriteLine("|---|--:|--:|--:|--:|--:|--:|--:|");
        StepRecord typical = steps[steps.Length / 2];
        Dictionary<Part, double> medians = Enum.GetValues<Part>().ToDictionary(part => part, part => Median(steps, part));
        double total = medians.Values.Sum();
        double floors = 0;
        foreach (Part part in Enum.GetValues<Part>())
        {
            Work work = PartWork.Of(part, model, typical);
            double floor = Machine.FloorSeconds(work) * 1e3;
            floors += floor;
            Print(PartWork.Name(part), work, PartWork.ActivationBytes(part, model, typical), floor, medians[part]);
        }

        Work[] works = [.. Enum.GetValues<Part>().Select(part => PartWork.Of(part, model, typical))];
        Print("**step**", new Work(works.Sum(w => w.Flops), works.Sum(w => w.Bytes)),
            Enum.GetValues<Part>().Sum(part => PartWork.ActivationBytes(part, model, typical)), floors, total);

        void Print(string name, Work work, double activations, double floor, double milliseconds)
            => text.WriteLine(string.Create(CultureInfo.InvariantCulture,
                $"| {name} | {work.Flops / 1e9:F3} | {work.Bytes / 1e6:F1} | {activations / 1e6:F1} | {floor:F2} | {milliseconds:F2} | "
                + $"{(floor >= 0.005 ? $"{floor / milliseconds * 100:F0}%" : "")} | {milliseconds / total * 100:F1}% |"));
    }

    private static double Median(StepRecord[] steps, Part part)
    {
        double[] all = [.. steps.Select(step => step.Milliseconds(part)).Order()];
        return all[all.Length / 2];
    }
}
