using System.Runtime.CompilerServices;
using Grpc.Core;

namespace Rollout.Client;

public sealed partial class RolloutClient
{
    /// <summary>Draws <see cref="GenerateOptions.N"/> samples from one prompt and yields each when it ends, in order of ending.</summary>
    /// <param name="prompt">Token ids (<c>int[]</c>) or text (<c>string</c>).</param>
    /// <param name="timeout">Of the whole group; <see cref="DefaultWorkTimeout"/> when null.</param>
    /// <remarks>Leaving the loop early or cancelling ends all samples that are still running.</remarks>
    /// <exception cref="RolloutRequestException">The request is invalid; lists everything wrong with it.</exception>
    /// <exception cref="RolloutBusyException">No room now.</exception>
    public IAsyncEnumerable<Sample> GenerateAsync(
        Prompt prompt, GenerateOptions? options = null, TimeSpan? timeout = null, CancellationToken cancellationToken = default) =>
        GenerateAsync(new RolloutRequest(prompt, options), timeout, cancellationToken);

    /// <inheritdoc cref="GenerateAsync(Prompt, GenerateOptions?, TimeSpan?, CancellationToken)"/>
    public async IAsyncEnumerable<Sample> GenerateAsync(
        RolloutRequest request, TimeSpan? timeout = null, [EnumeratorCancellation] CancellationToken cancellationToken = default)
    {
        GroupAssembly group = new(request.RequestId, request.Options.N);
        await foreach (V1.GenerateReply reply in RepliesAsync(request, stream: false, timeout, cancellationToken))
        {
            foreach (Sample sample in group.Add(reply))
                yield return sample;
        }

        ThrowIfIncomplete(group);
    }

    /// <summary>As GenerateAsync, but yields tokens as they are sampled; chunks of the group's samples interleave.</summary>
    public IAsyncEnumerable<SampleChunk> StreamAsync(
        Prompt prompt, GenerateOptions? options = null, TimeSpan? timeout = null, CancellationToken cancellationToken = default) =>
        StreamAsync(new RolloutRequest(prompt, options), timeout, cancellationToken);

    /// <inheritdoc cref="StreamAsync(Prompt, GenerateOptions?, TimeSpan?, CancellationToken)"/>
    public async IAsyncEnumerable<SampleChunk> StreamAsync(
        RolloutRequest request, TimeSpan? timeout = null, [EnumeratorCancellation] CancellationToken cancellationToken = default)
    {
        await foreach (V1.GenerateReply reply in RepliesAsync(request, stream: true, timeout, cancellationToken))
        {
            foreach (V1.SampleChunk chunk in reply.Samples)
                yield return SampleChunk.From(request.RequestId, chunk);
        }
    }

    private async IAsyncEnumerable<V1.GenerateReply> RepliesAsync(
        RolloutRequest request, bool stream, TimeSpan? timeout, [EnumeratorCancellation] CancellationToken cancellationToken)
    {
        V1.GenerateRequest message = request.ToProto(stream);
        CallOptions options = Options(timeout ?? DefaultWorkTimeout, cancellationToken);
        using AsyncServerStreamingCall<V1.GenerateReply> call = _rollout.Generate(message, options);
        while (await NextAsync(call.ResponseStream, request.RequestId, options))
            yield return call.ResponseStream.Current;
    }

    private static async Task<bool> NextAsync(
        IAsyncStreamReader<V1.GenerateReply> replies, string requestId, CallOptions options)
    {
        try
        {
            return await replies.MoveNext(CancellationToken.None);
        }
        catch (RpcException e)
        {
            throw Translate(e, options, requestId);
        }
    }

    private static void ThrowIfIncomplete(GroupAssembly group)
    {
        if (!group.Complete)
            throw new RolloutException($"the sidecar ended request '{group.RequestId}' before all its samples had ended");
    }
}
