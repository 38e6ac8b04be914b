using System.Runtime.InteropServices;
using CsCheck;
using Rollout.Kernels;
using Rollout.Kernels.Cuda;
using Rollout.Kernels.Tests.Cuda;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>The engine on the CUDA backend, on the simulated device: outside references, determinism, updates.</summary>
[Collection(nameof(CudaTests))]
public sealed class CudaTests
{
    public static TheoryData<string> Families => [.. TestModels.Families];

    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    private static RolloutEngine Load(string family, WeightFormat format, EngineOptions? options = null)
        => RolloutEngine.Load(
            TestModels.Folder(family), new CudaBackend(0, format), options ?? new EngineOptions { MaxBatchTokens = 64, MaxSequences = 8 });

    [Theory, MemberData(nameof(Families))]
    public async Task In_fp32_greedy_continuations_are_the_references_token_for_token(string family)
    {
        SimulatedDevice.Require();
        TestModels.Golden golden = TestModels.ReadGolden(family);
        await using RolloutEngine engine = Load(family, WeightFormat.Float32);
        for (int i = 0; i < golden.Prompts.Length; i++)
        {
            Sequence sample = (await engine.RunAsync(new GroupRequest
            {
                Id = $"{i}",
                Prompt = golden.Prompts[i],
                Temperature = 0,
                IgnoreEos = true,
                MaxTokens = golden.Continuations[i].Tokens.Length,
            }))[0];
            Assert.Equal(golden.Continuations[i].Tokens, sample.Tokens(0, sample.Published).ToArray());
            for (int t = 0; t < sample.Published; t++)
                Assert.Equal(golden.Continuations[i].LogProbs[t], sample.LogProbs(0, sample.Published)[t], 1e-3f);
        }
    }

    /// <summary>
    /// bf16 rounds the inputs of matmuls, keys, values, and gate and up. On these models, of width 64 to 128, that costs little more than
    /// rounding the matmuls' inputs alone; the error has no bias; and it changes a choice only where two tokens are almost equally
    /// probable.
    /// </summary>
    [Theory, MemberData(nameof(Families))]
    public async Task In_bf16_log_probabilities_are_near_the_references_and_clear_choices_are_equal(string family)
    {
        SimulatedDevice.Require();
        (double off, double mean) = await Differences(family, new CudaBackend(0), checkChoices: true);
        (double inputsOff, _) = await Differences(family, new CpuBackend(1, 0, WeightFormat.BFloat16Fast), checkChoices: false);
        Assert.InRange(off, 0, 2 * inputsOff); // of about 50 tokens: the test below has more
        Assert.InRange(mean, -1e-2, 1e-2);
    }

    /// <summary>Over 700 tokens, compared with fp32, which agrees with the references to within rounding.</summary>
    [Theory, MemberData(nameof(Families))]
    public async Task In_bf16_log_probabilities_are_near_those_of_fp32(string family)
    {
        SimulatedDevice.Require();
        const int Prompts = 12, Length = 60;
        float[] exact = await LogProbs(new CpuBackend(1)), inputsRounded = await LogProbs(new CpuBackend(1, 0, WeightFormat.BFloat16Fast));
        float[] found = await LogProbs(new CudaBackend(0));
        Assert.InRange(Off(found), 0, 1.4 * Off(inputsRounded));

        double Off(float[] logProbs) => logProbs.Zip(exact, (one, other) => Math.Abs(one - other)).Average();

        async Task<float[]> LogProbs(Backend backend)
        {
            await using RolloutEngine engine = RolloutEngine.Load(
                TestModels.Folder(family), backend, new EngineOptions { MaxBatchTokens = 64, MaxSequences = 8 });
            Random random = new(1);
            List<float> all = [];
            for (int i = 0; i < Prompts; i++)
            {
                int[] prompt = [.. Enumerable.Range(0, Length).Select(_ => random.Next(3, 300))];
                Group group = engine.Submit(new GroupRequest { Id = $"{i}", Prompt = prompt, MaxTokens = 0, PromptLogProbs = true });
                await group.Completed.WaitAsync(TimeSpan.FromSeconds(60), Cancelled);
                all.AddRange(group.PromptLogProbs[..(Length - 1)]);
            }

            return [.. all];
        }
    }

    /// <summary>
    /// Mean absolute and mean signed difference of the log-probabilities of the reference's tokens, each given the tokens before it.
    /// </summary>
    private static async Task<(double Off, double Mean)> Differences(string family, Backend backend, bool checkChoices)
    {
        TestModels.Golden golden = TestModels.ReadGolden(family);
        await using RolloutEngine engine = RolloutEngine.Load(
            TestModels.Folder(family), backend, new EngineOptions { MaxBatchTokens = 64, MaxSequences = 8 });
        using SafetensorsFile reference = SafetensorsFile.Open(Path.Combine(TestModels.Folder(family), "golden.safetensors"));
        List<double> differences = [];
        int vocabulary = engine.Model.VocabSize, clear = 0;
        for (int i = 0; i < golden.Prompts.Length; i++)
        {
            int[] prompt = golden.Prompts[i];
            int[] whole = [.. prompt, .. golden.Continuations[i].Tokens];
            Group group = engine.Submit(
                new GroupRequest { Id = $"{i}", Prompt = whole, MaxTokens = 0, PromptLogProbs = true, PromptTop = 1 });
            await group.Completed.WaitAsync(TimeSpan.FromSeconds(60), Cancelled);
            for (int t = 0; t < golden.Continuations[i].Tokens.Length; t++)
                differences.Add(golden.Continuations[i].LogProbs[t] - group.PromptLogProbs[prompt.Length - 1 + t]);

            TensorInfo info = reference.Tensors[$"logits.{i}"];
            float[] logits = new float[info.Elements];
            reference.Read(info, 0, MemoryMarshal.AsBytes(logits.AsSpan()));
            for (int position = 0; position < prompt.Length && checkChoices; position++)
            {
                int[] order = [.. Enumerable.Range(0, vocabulary).OrderByDescending(v => logits[(position * vocabulary) + v]).Take(2)];
                if (logits[(position * vocabulary) + order[0]] - logits[(position * vocabulary) + order[1]] <= 0.2f) continue;
                clear++;
                Assert.Equal(order[0], group.PromptTopIds[position]);
            }
        }

        Assert.True(clear > 10 || !checkChoices, $"only {clear} positions had a clear choice");
        return (differences.Average(Math.Abs), differences.Average());
    }

    /// <summary>
    /// A decode step costs eight launches a layer, one graph and one synchronisation, and reads every matrix once, whatever the number of
    /// rows: the difference of two runs that differ by ten steps.
    /// </summary>
    [Theory]
    [InlineData("qwen2", 1)] // biases
    [InlineData("qwen3", 5)] // norms of heads
    [InlineData("qwen3", 18)]
    public async Task A_decode_step_costs_one_graph_and_one_wait_and_reads_every_matrix_once(string family, int n)
    {
        SimulatedDevice.RequireSimulated();
        CudaBackend backend = new(0);
        await using RolloutEngine engine = RolloutEngine.Load(
            TestModels.Folder(family), backend, new EngineOptions { MaxBatchTokens = 40, MaxSequences = 20, MaxContext = 256 });
        await Run(15);
        await Run(15); // captures a graph for the prompt's step, which is shorter now that the prefix is cached
        (SimulatedDevice.Counters few, long fewGraphs) = await Run(5);
        (SimulatedDevice.Counters many, long manyGraphs) = await Run(15);
        SimulatedDevice.Counters steps = many - few;
        ModelSpec model = engine.Model;
        const int Steps = 10;
        const int Around = 5;  // embed, gather, norm, head, sample
        const int MatMuls = 4; // of a layer
        Assert.Equal(Steps * ((8 * model.Layers.Count) + Around), steps.Launches);
        Assert.Equal(steps.Launches - (Steps * ((MatMuls * model.Layers.Count) + 1)), steps.EarlyLaunches); // all but matmuls
        Assert.Equal(Steps, steps.Synchronisations);
        Assert.Equal(Steps, manyGraphs - fewGraphs);
        Assert.Equal(0, steps.Allocations);
        long queries = model.Attention.QueryWidth;
        long layer = model.HiddenSize * (queries + (2 * model.Attention.KvWidth) + queries + (3L * model.Mlp.Width));
        long elements = (model.Layers.Count * layer) + ((long)model.VocabSize * model.HiddenSize);
        Assert.Equal(Steps * sizeof(ushort) * elements, steps.MatMulWeightBytes);
        Assert.InRange(steps.DeviceToHostBytes / Steps, 1, 12 * n);

        async Task<(SimulatedDevice.Counters Counters, long Graphs)> Run(int tokens)
        {
            (SimulatedDevice.Counters counters, long graphs) = (SimulatedDevice.Count(), backend.GraphLaunches);
            await engine.RunAsync(new GroupRequest
            {
                Id = "probe",
                Prompt = [.. Enumerable.Range(3, 20)],
                N = n,
                MaxTokens = tokens,
                Seed = 3,
                IgnoreEos = true,
            });
            return (SimulatedDevice.Count() - counters, backend.GraphLaunches - graphs);
        }
    }

    /// <summary>Keys and values that the samples of a group share are read once a step, whatever the number of samples.</summary>
    [Theory]
    [InlineData(WeightFormat.BFloat16, 1)]
    [InlineData(WeightFormat.BFloat16, 8)]
    [InlineData(WeightFormat.Float32, 5)]
    public async Task The_keys_and_values_of_a_shared_prompt_are_read_once_for_a_group(WeightFormat format, int n)
    {
        SimulatedDevice.RequireSimulated();
        const int Prompt = 256; // two whole chunks
        await using RolloutEngine engine = Load("qwen3", format, new EngineOptions { MaxBatchTokens = 320, MaxSequences = 8 });
        await Run(3); // from here on the prompt is in the cache
        SimulatedDevice.Counters few = await Run(4), many = await Run(14);
        ModelSpec model = engine.Model;

        // The step of token i has one row, token i - 1, which it need not read, and reads i - 2 own tokens before it.
        long own = Enumerable.Range(5, 10).Sum(i => i - 2);
        long token = 2L * model.Layers.Count * model.Attention.KvWidth * (format == WeightFormat.Float32 ? sizeof(float) : sizeof(ushort));
        Assert.Equal(token * ((10 * Prompt) + (n * own)), (many - few).StagedBytes);

        async Task<SimulatedDevice.Counters> Run(int tokens)
        {
            SimulatedDevice.Counters before = SimulatedDevice.Count();
            await engine.RunAsync(new GroupRequest
            {
                Id = "probe",
                Prompt = [.. Enumerable.Range(0, Prompt).Select(i => 3 + (i % 50))],
                N = n,
                MaxTokens = tokens,
                Seed = 3,
                IgnoreEos = true,
            });
            return SimulatedDevice.Count() - before;
        }
    }

    [Fact]
    public async Task The_next_step_is_queued_before_the_results_of_the_one_before_are_waited_for()
    {
        SimulatedDevice.Require();
        ScriptedBackend device = new(new CudaBackend(0));
        await using RolloutEngine engine = RolloutEngine.Load(
            TestModels.Folder("qwen3"), device, new EngineOptions { MaxBatchTokens = 64, MaxSequences = 8 });
        await engine.RunAsync(new GroupRequest { Id = "probe", Prompt = [5, 6, 7], N = 2, MaxTokens = 6, Seed = 3, IgnoreEos = true });
        // The first step allocates memory; from max_tokens the scheduler knows which step is the last.
        Assert.Equal("BF" + "BBFBFBFBFBFF", device.Order);
    }

    [Fact]
    public async Task Under_keep_new_weights_take_over_between_two_steps_though_one_is_in_flight()
    {
        SimulatedDevice.Require();
        using UpdatePayload payload = UpdatePayload.Of("qwen3");
        ScriptedBackend device = new(new CudaBackend(0));
        int[] prompt = [.. Enumerable.Range(3, 40)];
        GroupRequest request = new() { Id = "probe", Prompt = prompt, N = 3, MaxTokens = 30, Seed = 9, IgnoreEos = true };
        await using RolloutEngine engine = RolloutEngine.Load(
            TestModels.Folder("qwen3"), device, new EngineOptions { MaxBatchTokens = 64, MaxSequences = 8 });
        using WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(0, 1) with { Policy = UpdatePolicy.Keep });
        update.Write(0, payload.Bytes);
        Group group = engine.SubmitAndHold(device, request, tokens: 10);
        Task committed = update.CommitAsync(payload.Digest, Cancelled);
        device.LetGo();
        await committed;
        await group.Completed.WaitAsync(Cancelled);
        using CudaBackend other = new(0);
        using TwoModels models = new(other, TestModels.Folder("qwen3"), payload.Folder);
        foreach (Sequence sample in group.Sequences)
        {
            int swap = Array.IndexOf(sample.Versions(0, 30).ToArray(), 1ul);
            Assert.InRange(swap, 10, 29);
            (int[] tokens, float[] logProbs) = models.Run(request, sample.Index, swap);
            Assert.Equal(tokens, sample.Tokens(0, 30).ToArray());
            Assert.Equal(logProbs, sample.LogProbs(0, 30).ToArray());
        }
    }

    /// <summary>
    /// Many samples, in little memory, that end before max_tokens: their rows of the step queued ahead are discarded, and their blocks go
    /// to other samples at once. Every token's log-probability equals, bit for bit, what scoring the sample gives.
    /// </summary>
    [Theory]
    [InlineData(400)]
    [InlineData(100_000)]
    public async Task Samples_that_end_while_a_step_is_in_flight_do_not_change_others(int kvTokens)
    {
        SimulatedDevice.Require();
        using CudaBackend sizes = new(0);
        EngineOptions options = new()
        {
            MaxBatchTokens = 48,
            MaxSequences = 12,
            MaxContext = 128,
            KvCacheBytes = kvTokens * 2L * 3 * 2 * 32 * sizes.KvElementBytes, // of qwen3: keys and values, layers, heads, their size
        };
        await using RolloutEngine engine = Load("qwen3", WeightFormat.BFloat16, options);
        Random random = new(kvTokens);
        Group[] groups = [.. Enumerable.Range(0, 12).Select(g => engine.Submit(new GroupRequest
        {
            Id = $"{g}",
            Prompt = [.. Enumerable.Range(0, random.Next(1, 40)).Select(_ => random.Next(3, 320))],
            N = 4,
            MaxTokens = 30,
            Seed = (ulong)g,
            StopTokenIds = [.. Enumerable.Range(3, 317).Where(_ => random.Next(8) == 0)],
        }))];
        await Task.WhenAll(groups.Select(group => group.Completed)).WaitAsync(TimeSpan.FromSeconds(120), Cancelled);
        Assert.Contains(groups, group => group.Sequences.Any(sample => sample.FinishReason == FinishReason.Stop));
        foreach (Group group in groups)
        {
            foreach (Sequence sample in group.Sequences)
            {
                int[] prompt = group.Request.Prompt, whole = [.. prompt, .. sample.Tokens(0, sample.Published)];
                Group score = engine.Submit(new GroupRequest { Id = "score", Prompt = whole, MaxTokens = 0, PromptLogProbs = true });
                await score.Completed.WaitAsync(TimeSpan.FromSeconds(60), Cancelled);
                Assert.Equal(score.PromptLogProbs[(prompt.Length - 1)..(whole.Length - 1)], sample.LogProbs(0, sample.Published).ToArray());
            }
        }
    }

    /// <summary>
    /// A step can outgrow its upload buffer while the one before is in flight: here by the biases of a group that waited for seats.
    /// </summary>
    [Fact]
    public async Task A_step_larger_than_any_before_keeps_the_results_of_the_one_in_flight()
    {
        SimulatedDevice.Require();
        GroupRequest first = new() { Id = "first", Prompt = [5, 6, 7], N = 5, MaxTokens = 6, Seed = 1, IgnoreEos = true };
        GroupRequest second = first with { Id = "second", N = 1, MaxTokens = 20, Seed = 2 };
        Dictionary<int, float> biases = Enumerable.Range(3, 300).ToDictionary(id => id, id => id % 7 / 10f);
        GroupRequest third = first with { Id = "third", Seed = 3, LogitBias = biases };
        string[][] alone = [await Run(first), await Run(second), await Run(third)];
        Assert.Equal(alone, await Together());

        async Task<string[]> Run(GroupRequest request)
        {
            await using RolloutEngine engine = Load("qwen3", WeightFormat.BFloat16);
            return [.. (await engine.RunAsync(request)).Select(sample => sample.Bits())];
        }

        async Task<string[][]> Together()
        {
            await using RolloutEngine engine = Load(
                "qwen3", WeightFormat.BFloat16, new EngineOptions { MaxBatchTokens = 64, MaxSequences = 6 });
            Group[] groups = [engine.Submit(first), engine.Submit(second), engine.Submit(third)];
            await Task.WhenAll(groups.Select(group => group.Completed)).WaitAsync(TimeSpan.FromSeconds(60), Cancelled);
            return [.. groups.Select(group => group.Sequences.Select(sample => sample.Bits()).ToArray())];
        }
    }

    /// <summary>Also for a context long enough that attention splits it into chunks, unlike the first step's.</summary>
    [Fact]
    public async Task All_memory_is_allocated_at_start()
    {
        SimulatedDevice.RequireSimulated();
        await using RolloutEngine engine = Load("qwen3", WeightFormat.BFloat16);
        SimulatedDevice.Counters before = SimulatedDevice.Count();
        int[] prompt = [.. Enumerable.Range(3, 300)];
        await engine.RunAsync(
            new GroupRequest { Id = "probe", Prompt = prompt, N = 2, MaxTokens = 4, TopLogProbs = 3, IgnoreEos = true });
        Assert.Equal(0, (SimulatedDevice.Count() - before).Allocations);
    }

    [Fact]
    public async Task Keys_and_values_take_the_stated_part_of_what_the_device_has_free()
    {
        SimulatedDevice.Require();
        CudaBackend backend = new(0);
        long free = backend.AvailableBytes;
        await using RolloutEngine engine = RolloutEngine.Load(
            TestModels.Folder("qwen3"), backend, new EngineOptions { KvCacheFraction = 0.02, MaxContext = 64 });
        ModelSpec model = engine.Model;
        long taken = engine.Status.KvBlocksTotal * 2L * model.Layers.Count * model.Attention.KvWidth * KvCache.BlockTokens * sizeof(ushort);
        Assert.InRange(taken, 0.019 * free, 0.02 * free);
    }

    [Fact]
    public void A_sample_is_the_same_bits_however_it_is_run()
    {
        SimulatedDevice.Require();
        Gen.Select(Gen.OneOf(TestModels.Families), DeterminismTests.s_request, DeterminismTests.s_way, Gen.Int, Gen.Bool).Sample(
            (family, request, way, noise, fp32) =>
            {
                request = request with
                {
                    Prompt = request.Prompt[..Math.Min(request.Prompt.Length, 40)],
                    MaxTokens = Math.Min(request.MaxTokens ?? 12, 12),
                    MinTokens = 0,
                };
                way = way with { Neighbours = Math.Min(way.Neighbours, 6) };
                string[] alone = Run(new DeterminismTests.Way(512, 64, 100_000, 0, false, 1, 0), 0);
                string[] other = Run(way, noise);
                return alone.SequenceEqual(other) ? true : throw new InvalidOperationException(
                    $"alone:\n{string.Join('\n', alone)}\nother way:\n{string.Join('\n', other)}");

                string[] Run(DeterminismTests.Way run, int seed)
                {
                    CudaBackend backend = new(0, fp32 ? WeightFormat.Float32 : WeightFormat.BFloat16);
                    return DeterminismTests.Run(family, request, run, seed, backend).GetAwaiter().GetResult();
                }
            },
            iter: 6,
            threads: 1);
    }

    [Theory]
    [InlineData(WeightFormat.BFloat16)]
    [InlineData(WeightFormat.Float32)]
    public async Task Every_case_the_contract_names(WeightFormat format)
    {
        SimulatedDevice.Require();

        // A context of several chunks, so that attention is cut by chunks, and samples share them.
        int[] prompt = [.. Enumerable.Range(3, 130)];
        GroupRequest request = new() { Id = "probe", Prompt = prompt, N = 4, MaxTokens = 8, Seed = 11, IgnoreEos = true };
        string[] alone = await Run(new(512, 64, 100_000, 0, false, 1, 0));
        foreach (DeterminismTests.Way way in (DeterminismTests.Way[])
        [
            new(512, 64, 100_000, 12, false, 1, 0), // in a batch
            new(7, 64, 100_000, 0, false, 1, 0),    // in chunks
            new(512, 64, 100_000, 0, true, 1, 0),   // prefix hits
            new(64, 64, 160, 3, false, 1, 0),       // hardly any room for keys and values
        ])
        {
            Assert.Equal(alone, await Run(way));
        }

        Task<string[]> Run(DeterminismTests.Way way) => DeterminismTests.Run("qwen3", request, way, 5, new CudaBackend(0, format));
    }

    [Theory]
    [InlineData(WeightFormat.BFloat16, UpdateMode.Staged)]
    [InlineData(WeightFormat.Float32, UpdateMode.InPlace)]
    public async Task After_a_commit_the_engine_is_one_that_loaded_the_new_weights(WeightFormat format, UpdateMode mode)
    {
        SimulatedDevice.Require();
        using UpdatePayload payload = UpdatePayload.Of("qwen2");
        int[] prompt = [.. Enumerable.Range(3, 20)];
        GroupRequest request = new() { Id = "probe", Prompt = prompt, N = 2, MaxTokens = 10, Seed = 9, IgnoreEos = true };
        EngineOptions options = new() { MaxBatchTokens = 64, MaxSequences = 8 };
        await using RolloutEngine fresh = RolloutEngine.Load(payload.Folder, new CudaBackend(0, format), options);
        await using RolloutEngine engine = Load("qwen2", format, options);
        string old = (await engine.RunAsync(request))[1].Bits();
        using (WeightUpdate update = await engine.OpenUpdateAsync(payload.Manifest(0, 1) with { Mode = mode }))
        {
            update.Write(0, payload.Bytes);
            await update.CommitAsync(payload.Digest, Cancelled);
        }

        string updated = (await engine.RunAsync(request))[1].Bits();
        Assert.NotEqual(old, updated);
        Assert.Equal((await fresh.RunAsync(request))[1].Bits(), updated);
    }
}
