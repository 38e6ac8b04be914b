using Rollout.Client;

namespace Rollout.Load.Bench;

/// <summary>A trainer concurrent with the samples: pushes the whole model through shared memory repeatedly.</summary>
internal static class BackgroundUpdates
{
    /// <summary>
    /// Pushes at every multiple of <paramref name="every"/>, or as soon as the previous push has ended, until <paramref name="enough"/>; a
    /// push in flight is finished first. KEEP, so that the update is measured without recomputing samples.
    /// </summary>
    public static async Task<List<PushTimings>> RunAsync(
        RolloutClient client, IReadOnlyList<TensorSource> model, TimeSpan every, CancellationToken enough)
    {
        await using WeightPublisher publisher = new(client);
        using PeriodicTimer timer = new(every);
        PushOptions keep = new() { Policy = UpdatePolicy.Keep };
        List<PushTimings> pushes = [];
        try
        {
            while (await timer.WaitForNextTickAsync(enough))
                pushes.Add((await publisher.PushAsync(model, options: keep, cancellationToken: CancellationToken.None)).Timings);
        }
        catch (OperationCanceledException)
        {
            // The samples are complete.
        }

        return pushes;
    }

    /// <summary>The tensors of a model that <see cref="ShapeS.Write"/> wrote.</summary>
    public static IReadOnlyList<TensorSource> Read(string modelFolder)
    {
        UpdatePayload payload = UpdatePayload.Read(modelFolder);
        List<TensorSource> sources = [];
        foreach (V1.ManifestTensor tensor in payload.Manifest)
        {
            long[] shape = [.. tensor.Shape.Select(dimension => (long)dimension)];
            int bytes = checked((int)(sizeof(ushort) * shape.Aggregate(1L, (product, dimension) => product * dimension)));
            sources.Add(TensorSource.FromMemory(tensor.Name, TensorDType.BF16, shape, payload.Bytes.AsMemory((int)tensor.Offset, bytes)));
        }

        return sources;
    }
}
