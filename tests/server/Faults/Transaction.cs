using Google.Protobuf;
using Grpc.Core;
using Rollout.V1;

namespace Rollout.Server.Tests;

/// <summary>One Weights.Update call, step by step, without a client library, so that invalid messages can be sent.</summary>
internal sealed class Transaction : IDisposable
{
    private readonly AsyncDuplexStreamingCall<UpdateRequest, UpdateReply> _call;

    public Transaction(WeightsService.WeightsServiceClient weights) => _call = weights.Update(deadline: Calls.Deadline());

    /// <summary>False when the server has ended the call; <see cref="EndAsync"/> gives the reason.</summary>
    public async Task<bool> SendAsync(UpdateRequest request)
    {
        try
        {
            await _call.RequestStream.WriteAsync(request);
            return true;
        }
        catch (Exception e) when (e is RpcException or InvalidOperationException)
        {
            return false;
        }
    }

    /// <summary>Null when the update may continue; otherwise the server's refusal.</summary>
    public async Task<UpdateReply?> BeginAsync(BeginUpdate begin)
    {
        await SendAsync(new UpdateRequest { Begin = begin });
        UpdateReply reply = await NextAsync();
        return reply.StepCase == UpdateReply.StepOneofCase.Ready ? null : reply;
    }

    /// <exception cref="RpcException">The server ended the call without an answer.</exception>
    public async Task<UpdateReply> NextAsync()
    {
        if (!await _call.ResponseStream.MoveNext(default)) throw new RpcException(new Status(StatusCode.Unknown, "the call ended"));
        return _call.ResponseStream.Current;
    }

    /// <summary>Waits until the server has read this many bytes.</summary>
    public async Task LandedAsync(ulong bytes)
    {
        while (true)
        {
            UpdateReply reply = await NextAsync();
            Assert.True(reply.StepCase == UpdateReply.StepOneofCase.Progress, $"expected progress, got {reply}");
            if (reply.Progress.PayloadBytes >= bytes) return;
        }
    }

    /// <summary>The last reply.</summary>
    public async Task<UpdateReply> EndAsync()
    {
        while (true)
        {
            UpdateReply reply = await NextAsync();
            if (reply.StepCase != UpdateReply.StepOneofCase.Progress) return reply;
        }
    }

    public Task CloseAsync() => _call.RequestStream.CompleteAsync();

    /// <summary>Without an end of its own, the stream breaks.</summary>
    public void Dispose() => _call.Dispose();

    public static UpdateRequest Chunk(byte[] payload, int from, int to)
        => new() { Chunk = new Chunk { Offset = (ulong)from, Data = ByteString.CopyFrom(payload.AsSpan(from, to - from)) } };

    public static UpdateRequest Window(string path, int from, int to) => new()
    {
        SharedMemory = new SharedMemory { Path = path, Offset = (ulong)from, PayloadOffset = (ulong)from, Bytes = (ulong)(to - from) },
    };
}
