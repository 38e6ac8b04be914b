using System.Runtime.CompilerServices;
using System.Runtime.ExceptionServices;
using Grpc.Core;

namespace Rollout.Client;

public sealed partial class RolloutClient
{
    /// <inheritdoc cref="GenerateBatchAsync(IAsyncEnumerable{RolloutRequest}, Action{RolloutException}?, TimeSpan?, CancellationToken)"/>
    public IAsyncEnumerable<Sample> GenerateBatchAsync(
        IEnumerable<RolloutRequest> requests,
        Action<RolloutException>? onRefused = null,
        TimeSpan? timeout = null,
        CancellationToken cancellationToken = default) =>
        GenerateBatchAsync(requests.ToAsyncEnumerable(), onRefused, timeout, cancellationToken);

    /// <summary>Many groups on one call. Yields each sample of any group when it ends.</summary>
    /// <param name="requests">Read and sent while samples are returned, so it may be endless and depend on them.</param>
    /// <param name="onRefused">
    /// Called for each refused group at once; nothing is thrown for it then. It may be called on another thread than the
    /// one that reads the samples, but never by two threads at once.
    /// </param>
    /// <param name="timeout">Of the whole batch; <see cref="DefaultWorkTimeout"/> when null.</param>
    /// <remarks>
    /// A refused group does not affect the others: without <paramref name="onRefused"/> all refusals are thrown together after the last
    /// sample. Leaving the loop early or cancelling ends all samples that are still running.
    /// </remarks>
    /// <exception cref="RolloutBatchException">Groups were refused and there is no <paramref name="onRefused"/>.</exception>
    public async IAsyncEnumerable<Sample> GenerateBatchAsync(
        IAsyncEnumerable<RolloutRequest> requests,
        Action<RolloutException>? onRefused = null,
        TimeSpan? timeout = null,
        [EnumeratorCancellation] CancellationToken cancellationToken = default)
    {
        await foreach (EndedSample ended in EndedSamplesAsync(requests, onRefused, timeout, cancellationToken))
            yield return ended.Sample;
    }

    /// <inheritdoc cref="GenerateGroupsAsync(IAsyncEnumerable{RolloutRequest}, Action{RolloutException}?, TimeSpan?, CancellationToken)"/>
    public IAsyncEnumerable<SampleGroup> GenerateGroupsAsync(
        IEnumerable<RolloutRequest> requests,
        Action<RolloutException>? onRefused = null,
        TimeSpan? timeout = null,
        CancellationToken cancellationToken = default) =>
        GenerateGroupsAsync(requests.ToAsyncEnumerable(), onRefused, timeout, cancellationToken);

    /// <summary>Many groups on one call. Yields each group when its last sample has ended, in order of ending.</summary>
    /// <param name="requests">Read and sent while groups are returned, so it may be endless and depend on them.</param>
    /// <param name="onRefused">
    /// Called for each refused group at once; nothing is thrown for it then. It may be called on another thread than the
    /// one that reads the groups, but never by two threads at once.
    /// </param>
    /// <param name="timeout">Of the whole batch; <see cref="DefaultWorkTimeout"/> when null.</param>
    /// <remarks>
    /// A refused group does not affect the others: without <paramref name="onRefused"/> all refusals are thrown together after the last
    /// group. A sample that fails or is aborted is part of its group like any other: <see cref="Sample.FinishReason"/> says so. Leaving the
    /// loop early or cancelling ends all samples that are still running.
    /// </remarks>
    /// <exception cref="RolloutBatchException">Groups were refused and there is no <paramref name="onRefused"/>.</exception>
    public async IAsyncEnumerable<SampleGroup> GenerateGroupsAsync(
        IAsyncEnumerable<RolloutRequest> requests,
        Action<RolloutException>? onRefused = null,
        TimeSpan? timeout = null,
        [EnumeratorCancellation] CancellationToken cancellationToken = default)
    {
        Dictionary<string, Sample[]> open = [];
        await foreach ((Sample sample, RolloutRequest request, bool last) in
            EndedSamplesAsync(requests, onRefused, timeout, cancellationToken))
        {
            if (!open.TryGetValue(request.RequestId, out Sample[]? samples))
                open.Add(request.RequestId, samples = new Sample[request.Options.N]);
            samples[sample.Index] = sample;
            if (!last)
                continue;
            open.Remove(request.RequestId);
            yield return new SampleGroup(request, samples);
        }
    }

    private async IAsyncEnumerable<EndedSample> EndedSamplesAsync(
        IAsyncEnumerable<RolloutRequest> requests,
        Action<RolloutException>? onRefused,
        TimeSpan? timeout,
        [EnumeratorCancellation] CancellationToken cancellationToken)
    {
        using CancellationTokenSource ended = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken);
        CancellationToken token = ended.Token;
        CallOptions options = Options(timeout ?? DefaultWorkTimeout, token);
        using AsyncDuplexStreamingCall<V1.GenerateRequest, V1.GenerateReply> call = _rollout.GenerateBatch(options);
        Batch batch = new(onRefused);
        ExceptionDispatchInfo? sendError = null;
        bool allSent = false;
        // Not awaited when the caller stops early: it may be waiting for the caller's next request.
        _ = SendAsync();
        try
        {
            while (await MoveNextAsync())
            {
                foreach (EndedSample sample in batch.Add(call.ResponseStream.Current))
                    yield return sample;
            }

            if (!Volatile.Read(ref allSent))
                throw new RolloutException("the sidecar ended the batch before it had all requests");
            batch.ThrowIfRefusedOrIncomplete();
        }
        finally
        {
            await ended.CancelAsync();
        }

        async Task SendAsync()
        {
            try
            {
                await foreach (RolloutRequest request in requests.WithCancellation(token))
                {
                    if (batch.Begin(request) is { } message && !await TrySendAsync(message))
                        return;
                }

                Volatile.Write(ref allSent, true);
                await call.RequestStream.CompleteAsync();
            }
            catch (Exception e)
            {
                // Set before the call is cancelled, so that the reader sees it.
                Volatile.Write(ref sendError, ExceptionDispatchInfo.Capture(e));
                if (!token.IsCancellationRequested)
                    await ended.CancelAsync();
            }
        }

        async Task<bool> TrySendAsync(V1.GenerateRequest message)
        {
            try
            {
                await call.RequestStream.WriteAsync(message, token);
                return true;
            }
            catch (Exception e) when (e is RpcException or InvalidOperationException or OperationCanceledException or IOException)
            {
                // The call has ended; the reader gets the error.
                return false;
            }
        }

        async Task<bool> MoveNextAsync()
        {
            try
            {
                return await call.ResponseStream.MoveNext(CancellationToken.None);
            }
            catch (RpcException e)
            {
                cancellationToken.ThrowIfCancellationRequested();
                // An exception from the caller's enumerable of requests is why the call was cancelled, so that exception is thrown.
                Volatile.Read(ref sendError)?.Throw();
                throw Translate(e, options.WithCancellationToken(cancellationToken));
            }
        }
    }

    /// <summary>A sample that has ended, its request, and whether it is the last of its group.</summary>
    private readonly record struct EndedSample(Sample Sample, RolloutRequest Request, bool LastOfGroup);

    /// <summary>The groups of one batch that have been sent and have not ended. Used by sender and reader.</summary>
    private sealed class Batch(Action<RolloutException>? onRefused)
    {
        private readonly Lock _lock = new();
        private readonly Dictionary<string, (RolloutRequest Request, GroupAssembly Assembly)> _groups = [];
        // Not _lock: the caller's callback runs under it.
        private readonly Lock _refusing = new();
        private readonly List<RolloutException> _refused = [];

        /// <summary>The message to send, or null where the client itself refuses the group.</summary>
        public V1.GenerateRequest? Begin(RolloutRequest request)
        {
            V1.GenerateRequest message;
            try
            {
                message = request.ToProto(stream: false);
            }
            catch (ArgumentException e)
            {
                Refuse(new RolloutRequestException(e.Message, e) { RequestId = request.RequestId, Problems = e.Message });
                return null;
            }

            bool added;
            lock (_lock)
                added = _groups.TryAdd(request.RequestId, (request, new GroupAssembly(request.RequestId, request.Options.N)));
            if (added)
                return message;
            // The sidecar would refuse it too, but its answer could not be distinguished from one about the first group.
            Refuse(RolloutException.From(StatusCode.AlreadyExists, "a group with the same id is in flight", request.RequestId));
            return null;
        }

        public IEnumerable<EndedSample> Add(V1.GenerateReply reply)
        {
            (RolloutRequest Request, GroupAssembly Assembly) group;
            bool inFlight;
            lock (_lock)
                inFlight = _groups.TryGetValue(reply.RequestId, out group);
            if (!inFlight)
                throw new RolloutException($"the sidecar answered for request '{reply.RequestId}', which is not in flight");

            if (reply.Refused is { } refused)
            {
                Remove(reply.RequestId);
                Refuse(RolloutException.From((StatusCode)refused.Code, refused.Message, reply.RequestId));
                yield break;
            }

            foreach (Sample sample in group.Assembly.Add(reply))
            {
                bool last = group.Assembly.Complete;
                if (last)
                    Remove(reply.RequestId);
                yield return new EndedSample(sample, group.Request, last);
            }
        }

        public void ThrowIfRefusedOrIncomplete()
        {
            lock (_lock)
            {
                foreach ((_, GroupAssembly assembly) in _groups.Values)
                    ThrowIfIncomplete(assembly);
            }

            lock (_refusing)
            {
                if (_refused.Count > 0)
                    throw new RolloutBatchException([.. _refused]);
            }
        }

        private void Remove(string requestId)
        {
            lock (_lock)
                _groups.Remove(requestId);
        }

        private void Refuse(RolloutException error)
        {
            lock (_refusing)
            {
                if (onRefused is not null)
                    onRefused(error);
                else
                    _refused.Add(error);
            }
        }
    }
}
