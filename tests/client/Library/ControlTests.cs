using System.Reflection;
using Google.Protobuf;
using Google.Protobuf.Reflection;
using Xunit;

namespace Rollout.Client.Tests;

/// <summary>Replies of the sidecar are reported in the right fields, and requests reach it unchanged.</summary>
public sealed class ControlTests : FakeSidecarTests
{
    /// <summary>Every field of the message has a different value, so that swapped fields are detected.</summary>
    [Fact]
    public async Task Every_field_of_the_status_is_reported_under_its_name()
    {
        V1.StatusReply reply = new() { State = V1.EngineState.Paused, Asleep = { V1.MemoryTag.KvCache } };
        int number = 100;
        foreach (FieldDescriptor? field in V1.StatusReply.Descriptor.Fields.InDeclarationOrder())
        {
            number++;
            object? value = field.FieldType switch
            {
                Google.Protobuf.Reflection.FieldType.UInt32 => (uint)number,
                Google.Protobuf.Reflection.FieldType.UInt64 => (1UL << 40) + (ulong)number, // counters outgrow 32 bits
                Google.Protobuf.Reflection.FieldType.String => $"text {number}",
                Google.Protobuf.Reflection.FieldType.Bool => true,
                _ => null,
            };
            if (value is not null)
                field.Accessor.SetValue(reply, value);
        }

        reply.Memory = new V1.MemoryInUse
        {
            Weights = 1UL << 40,
            Staging = 2UL << 40,
            KvCache = 3UL << 40,
            Graphs = 4UL << 40,
            Nccl = 5UL << 40,
            Free = 6UL << 40,
        };
        Fake.Weights.Says = _ => reply;
        SidecarStatus status = await Client.StatusAsync(cancellationToken: Token);
        Assert.Equal((EngineState.Paused, MemoryTags.KvCache), (status.State, status.Asleep));
        Assert.Equal(new MemoryInUse(1L << 40, 2L << 40, 3L << 40, 4L << 40, 5L << 40, 6L << 40), status.Memory);
        foreach (PropertyInfo property in typeof(SidecarStatus).GetProperties())
        {
            object? sent = typeof(V1.StatusReply).GetProperty(property.Name)!.GetValue(reply);
            if (property.Name is not (nameof(SidecarStatus.State) or nameof(SidecarStatus.Asleep) or nameof(SidecarStatus.Memory)))
                Assert.Equal($"{property.Name} {sent}", $"{property.Name} {property.GetValue(status)}");
        }

        Assert.Equal(V1.StatusReply.Descriptor.Fields.InDeclarationOrder().Count, typeof(SidecarStatus).GetProperties().Length);
    }

    [Fact]
    public async Task States_keep_their_names_and_one_from_the_future_is_not_taken_for_another()
    {
        foreach (V1.EngineState state in Enum.GetValues<V1.EngineState>().Where(state => state != V1.EngineState.Unspecified))
        {
            Fake.Weights.Says = _ => new V1.StatusReply { State = state };
            Assert.Equal($"{state}", $"{(await Client.StatusAsync(cancellationToken: Token)).State}");
        }

        Fake.Weights.Says = _ => new V1.StatusReply { State = (V1.EngineState)99 };
        Assert.Equal(EngineState.Other, (await Client.StatusAsync(cancellationToken: Token)).State);
    }

    [Theory]
    [InlineData(MemoryTags.Weights, new[] { V1.MemoryTag.Weights })]
    [InlineData(MemoryTags.KvCache, new[] { V1.MemoryTag.KvCache })]
    [InlineData(MemoryTags.All, new[] { V1.MemoryTag.Weights, V1.MemoryTag.KvCache })]
    public async Task Sleep_and_wake_up_name_what_they_mean(MemoryTags tags, V1.MemoryTag[] sent)
    {
        Fake.Sleep = request =>
        {
            Assert.Equal(sent, request.Tags);
            Assert.Equal(tags == MemoryTags.All, request.KeepWeights);
            return new V1.SleepReply
            {
                State = V1.EngineState.Sleeping,
                Asleep = { V1.MemoryTag.KvCache, V1.MemoryTag.Weights },
                Freed =
                {
                    request.Tags.Select(tag => new V1.FreedMemory
                    {
                        Tag = tag,
                        AllocatedBytes = 5UL << 32,
                        FreedBytes = 3UL << 32,
                        FreeBytesBefore = 1UL << 32,
                        FreeBytesAfter = 4UL << 32,
                        HostBytes = 2UL << 32,
                    }),
                },
            };
        };
        SleepResult slept = await Client.SleepAsync(tags, keepWeights: tags == MemoryTags.All, cancellationToken: Token);
        Assert.Equal((EngineState.Sleeping, MemoryTags.All), (slept.State, slept.Asleep));
        Assert.Equal(tags, slept.Freed.Aggregate(MemoryTags.None, (all, freed) => all | freed.Tag));
        Assert.All(
            slept.Freed, freed => Assert.Equal(new FreedMemory(freed.Tag, 5L << 32, 3L << 32, 1L << 32, 4L << 32, 2L << 32), freed));

        Fake.WakeUp = request =>
        {
            Assert.Equal(sent, request.Tags);
            return new V1.WakeUpReply { State = V1.EngineState.Sleeping, Asleep = { V1.MemoryTag.Weights } };
        };
        Assert.Equal(MemoryTags.Weights, await Client.WakeUpAsync(tags, cancellationToken: Token));
    }

    /// <summary>On the wire, no tag means all tags: a caller that passes none must not put everything to sleep.</summary>
    [Theory]
    [InlineData(MemoryTags.None)]
    [InlineData((MemoryTags)4)]
    public async Task Sleep_and_wake_up_of_nothing_are_refused_here(MemoryTags tags)
    {
        await Assert.ThrowsAsync<ArgumentOutOfRangeException>(() => Client.SleepAsync(tags, cancellationToken: Token));
        await Assert.ThrowsAsync<ArgumentOutOfRangeException>(() => Client.WakeUpAsync(tags, cancellationToken: Token));
        Assert.Empty(Fake.Calls);
    }

    [Fact]
    public async Task A_pause_of_each_kind_arrives_as_that_kind_and_waits_as_long_as_its_lease()
    {
        TimeSpan left = default;
        List<V1.PauseRequest> requests = [];
        Fake.Arrived = context =>
        {
            left = context.Deadline - DateTime.UtcNow;
            return Task.CompletedTask;
        };
        Fake.Pause = request =>
        {
            requests.Add(request);
            return new V1.PauseReply { State = V1.EngineState.Paused };
        };
        foreach (PauseMode mode in Enum.GetValues<PauseMode>())
        {
            await Client.PauseAsync(mode, "me", TimeSpan.FromHours(2), cancellationToken: Token);
            Assert.InRange(left, TimeSpan.FromHours(1.9), TimeSpan.FromHours(2));
        }

        Assert.Equal(["Abort", "Wait", "Keep"], requests.Select(request => $"{request.Mode}"));
        Assert.All(requests, request => Assert.Equal(7_200_000u, request.LeaseMilliseconds));
        await Client.PauseAsync(PauseMode.Wait, "me", TimeSpan.FromMilliseconds(1), cancellationToken: Token);
        Assert.Equal(1u, requests[^1].LeaseMilliseconds);
        Assert.InRange(left, TimeSpan.FromSeconds(1), RolloutClient.DefaultControlTimeout);
        await Assert.ThrowsAsync<ArgumentOutOfRangeException>(
            () => Client.PauseAsync(PauseMode.Wait, "me", TimeSpan.Zero, cancellationToken: Token));
        await Assert.ThrowsAsync<ArgumentOutOfRangeException>(
            () => Client.PauseAsync(PauseMode.Wait, "me", TimeSpan.FromMilliseconds(1L << 32), cancellationToken: Token));
        Assert.Equal(4, requests.Count);
    }

    [Fact]
    public async Task The_weights_are_described_as_the_sidecar_does()
    {
        Fake.Weights.Version = 1UL << 40;
        Fake.Weights.Tensors["a.weight"] = [1, 2, 3, 4];
        WeightsDescription described = await Client.DescribeWeightsAsync(cancellationToken: Token);
        Assert.Equal((1UL << 40, "xxh3-128-tree-131072"), (described.Version, described.DigestAlgorithm));
        DescribedTensor tensor = Assert.Single(described.Tensors);
        Assert.Equal(("a.weight", TensorDType.BF16, 2L), (tensor.Name, tensor.DType, tensor.Shape.Single()));
        Assert.Equal(WeightDigest.Show(FakeWeights.DigestOf([1, 2, 3, 4])), tensor.Digest);
        foreach (TensorDType type in Enum.GetValues<TensorDType>())
            Assert.Equal((type, $"{type}".ToUpperInvariant()), (type.ToProto().ToClient(), $"{type.ToProto()}".ToUpperInvariant()));
    }

    [Fact]
    public async Task What_is_scored_and_aborted_arrives_as_it_was_asked_for()
    {
        V1.ScoreRequest? scored = null;
        Fake.Score = request =>
        {
            scored = request;
            return new V1.ScoreReply { Ids = { 4, 5 }, Logprobs = { -1 }, Version = 3 };
        };
        ScoreResult score = await Client.ScoreAsync("text", top: 3, cacheSalt: "mine", cancellationToken: Token);
        Assert.Equal(("text", 3u, "mine"), (scored!.Text, scored.Top, scored.CacheSalt));
        Assert.Equal([4, 5], score.Ids);
        Assert.Equal(3UL, score.Version);
        Assert.Null(score.Top);
        await Client.ScoreAsync(new[] { 7, 8 }, cancellationToken: Token);
        Assert.Equal([7u, 8u], scored.Ids.Ids);

        V1.AbortRequest? aborted = null;
        Fake.Abort = request =>
        {
            aborted = request;
            return new V1.AbortReply { Groups = 2, Samples = 5, Unknown = { "b" } };
        };
        AbortResult result = await Client.AbortAsync(["a", "b"], cancellationToken: Token);
        Assert.Equal((2, 5, "b"), (result.Groups, result.Samples, Assert.Single(result.Unknown)));
        Assert.Equal(["a", "b"], aborted!.Ids.Ids);
        // An empty list does not mean all.
        await Client.AbortAsync([], cancellationToken: Token);
        Assert.Equal((V1.AbortRequest.WhichOneofCase.Ids, 0), (aborted.WhichCase, aborted.Ids.Ids.Count));
        await Client.AbortAllAsync(cancellationToken: Token);
        Assert.True(aborted.All);
    }
}
