using CsCheck;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

/// <summary>The same request gives the same bits, whatever other work and settings the engine has.</summary>
public sealed class DeterminismTests
{
    /// <summary>One way of running a request.</summary>
    internal sealed record Way(int BatchTokens, int Seats, int KvTokens, int Neighbours, bool WarmPrefix, int Threads, int VectorBits);

    internal static readonly Gen<GroupRequest> s_request =
        from length in Gen.Int[1, 90]
        from prompt in Gen.Int[3, 319].Array[length]
        from n in Gen.Int[1, 6]
        from maxTokens in Gen.Int[1, 40]
        from seed in Gen.ULong
        from temperature in Gen.OneOf(0f, 0.7f, 1f, 1.3f)
        from topK in Gen.OneOf(0, 1, 20)
        from topP in Gen.OneOf(1f, 0.9f, 0.3f)
        from minP in Gen.OneOf(0f, 0.05f)
        from bias in Gen.Select(Gen.Int[0, 319], Gen.Float[-4, 4]).Array[0, 3]
        from minTokens in Gen.Int[0, maxTokens]
        from ignoreEos in Gen.Bool
        select new GroupRequest
        {
            Id = "probe",
            Prompt = prompt,
            N = n,
            MaxTokens = maxTokens,
            MinTokens = minTokens,
            Seed = seed,
            Temperature = temperature,
            TopK = topK,
            TopP = topP,
            MinP = minP,
            IgnoreEos = ignoreEos,
            LogitBias = bias.DistinctBy(entry => entry.Item1).ToDictionary(entry => entry.Item1, entry => entry.Item2),
        };

    internal static readonly Gen<Way> s_way =
        from batchTokens in Gen.OneOf(1, 7, 64, 512)
        from seats in Gen.OneOf(2, 9, 64)
        from kvTokens in Gen.OneOf(144, 400, 100_000) // the first holds one sample of full length: everything else is preempted
        from neighbours in Gen.OneOf(0, 3, 63)
        from warm in Gen.Bool
        from threads in Gen.Int[1, 2]
        from bits in Gen.OneOf(0, 512, 256, 128)
        select new Way(batchTokens, seats, kvTokens, neighbours, warm, threads, bits);

    [Fact]
    public void A_sample_is_the_same_bits_however_it_is_run()
        => Gen.Select(Gen.OneOf(TestModels.Families), s_request, s_way, Gen.Int).Sample((family, request, way, noise) =>
        {
            string[] alone = Run(family, request, new Way(512, 64, 100_000, 0, false, 1, 0), 0).GetAwaiter().GetResult();
            string[] other = Run(family, request, way, noise).GetAwaiter().GetResult();
            return alone.SequenceEqual(other) ? true : throw new InvalidOperationException(
                $"alone:\n{string.Join('\n', alone)}\nother way:\n{string.Join('\n', other)}");
        }, iter: 60, threads: 1);

    [Theory]
    [InlineData(1)]
    [InlineData(7)]
    [InlineData(512)]
    public async Task Every_case_the_contract_names(int chunk)
    {
        int[] prompt = [.. Enumerable.Range(3, 70)];
        GroupRequest request = new() { Id = "probe", Prompt = prompt, N = 4, MaxTokens = 24, Seed = 11, IgnoreEos = true };
        string[] alone = await Run("qwen3", request, new Way(512, 64, 100_000, 0, false, 1, 0), 0);
        foreach (Way way in (Way[])
        [
            new(chunk, 64, 100_000, 63, false, 1, 0),  // in a batch of 64
            new(chunk, 64, 100_000, 0, true, 1, 0),    // prefix hits
            new(chunk, 64, 144, 8, false, 1, 0),       // preempted
            new(chunk, 64, 100_000, 8, false, 2, 0),   // two threads
            new(chunk, 64, 100_000, 8, false, 2, 256), // narrower vectors
            new(chunk, 64, 100_000, 8, false, 2, 128),
        ])
        {
            Assert.Equal(alone, await Run("qwen3", request, way, chunk));
        }
    }

    /// <param name="family">Model.</param>
    /// <param name="request">The request.</param>
    /// <param name="way">The settings it is run with.</param>
    /// <param name="noise">Seed of the neighbours.</param>
    /// <param name="device">Null: the CPU.</param>
    internal static async Task<string[]> Run(string family, GroupRequest request, Way way, int noise, Backend? device = null)
    {
        int blockBytesPerToken = 2 * 3 * (device?.KvElementBytes ?? sizeof(float)); // keys and values, layers
        EngineOptions options = new()
        {
            MaxBatchTokens = way.BatchTokens,
            MaxSequences = way.Seats,
            MaxContext = 140,
            KvCacheBytes = (long)way.KvTokens * blockBytesPerToken * KvWidth(family),
        };
        await using RolloutEngine engine = device is null
            ? TestModels.Load(family, options, way.Threads, way.VectorBits)
            : RolloutEngine.Load(TestModels.Folder(family), device, options);
        if (way.WarmPrefix) await engine.RunAsync(request with { Id = "warm", N = 1, MaxTokens = 2, MinTokens = 0 });

        Random random = new(noise);
        List<Group> neighbours = [];
        for (int i = 0; i < way.Neighbours; i++)
        {
            neighbours.Add(engine.Submit(new GroupRequest
            {
                Id = $"neighbour {i}",
                Prompt = [.. Enumerable.Range(0, random.Next(1, 60)).Select(_ => random.Next(3, 320))],
                MaxTokens = random.Next(1, 30),
                Seed = (ulong)i,
                IgnoreEos = true,
            }));
            if (i == way.Neighbours / 2) neighbours.Add(engine.Submit(request));
        }

        if (way.Neighbours == 0) neighbours.Add(engine.Submit(request));
        await Task.WhenAll(neighbours.Select(group => group.Completed))
            .WaitAsync(TimeSpan.FromSeconds(120), TestContext.Current.CancellationToken);
        Group probe = neighbours.Single(group => group.Request.Id == "probe");
        if (way.KvTokens < 200 && way.Neighbours > 6) Assert.True(engine.Status.Preemptions > 0 || way.BatchTokens == 1 || way.Seats == 2);
        return [.. probe.Sequences.Select(sample => sample.Bits())];
    }

    private static int KvWidth(string family) => family == "qwen3" ? 2 * 32 : 2 * 16;
}
