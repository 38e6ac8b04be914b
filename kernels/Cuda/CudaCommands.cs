using System.Runtime.InteropServices;

namespace Rollout.Kernels.Cuda;

/// <summary>
/// The launches of a step, collected until its answers are needed. A list that equals one recorded before, down to the last argument, is
/// launched as one graph; any other list is launched one by one. Decode steps of one row bucket have equal lists: rows are rounded up, a
/// step's indices are always at the same addresses, what differs between steps is read from there, and weights do not move. Lists are
/// recorded at start only, by <see cref="Record"/>.
/// </summary>
internal sealed unsafe class CudaCommands : IDisposable
{
    private readonly CudaDevice _device;
    private readonly CudaKernels _kernels;
    private readonly CudaMatMul _matMul;
    private readonly List<Recorded> _recorded = [];
    private Command[] _commands = new Command[256];
    private Argument[] _arguments = new Argument[2048]; // of all commands, one after another
    private int _count, _argumentCount;
    private long _graphs;

    public CudaCommands(CudaDevice device, CudaKernels kernels, CudaMatMul matMul)
    {
        _device = device;
        _kernels = kernels;
        _matMul = matMul;
    }

    /// <summary>Lists that were launched as graphs.</summary>
    public long GraphLaunches { get; private set; }

    /// <summary>Graphs that were made.</summary>
    public long Graphs => Interlocked.Read(ref _graphs);

    /// <summary>Adds a kernel's launch. Arguments are those of its source, in order.</summary>
    public void Launch(nint function, Grid grid, int threads, int sharedBytes, params ReadOnlySpan<Argument> arguments) =>
        Note(new Command(function, grid, threads, sharedBytes, arguments.Length), arguments);

    /// <summary>Adds a matmul; see <see cref="CudaMatMul.Multiply"/>.</summary>
    public void Multiply(nuint input, nuint weight, nuint bias, nuint output, int rows, int outputs, int inputs, MatMulOutput kind) =>
        Note(new Command(0, default, 0, 0, 8), [input, weight, bias, output, rows, outputs, inputs, (int)kind]);

    /// <summary>Queues all collected launches on the device.</summary>
    public void Send()
    {
        if (_count == 0)
            return;
        _device.MakeCurrent();
        if (_device.Times is null && Find() is { } recorded)
        {
            recorded.Graph.Launch(_device.Stream);
            GraphLaunches++;
        }
        else
        {
            Run();
        }

        Clear();
    }

    /// <summary>Makes a graph of the collected launches, and runs nothing.</summary>
    public void Record()
    {
        if (_count > 0 && Find() is null)
        {
            _recorded.Add(new Recorded([.. Commands], [.. Arguments], Capture()));
            Interlocked.Increment(ref _graphs);
        }

        Clear();
    }

    /// <summary>Drops the collected launches.</summary>
    public void Clear() => (_count, _argumentCount) = (0, 0);

    /// <summary>Drops the graphs that use any of these addresses.</summary>
    public void Forget(nuint start, long bytes)
    {
        _recorded.RemoveAll(recorded =>
        {
            bool uses = recorded.Arguments.Any(argument => argument.Pointer >= start && argument.Pointer < start + (nuint)bytes);
            if (uses)
                recorded.Graph.Dispose();
            return uses;
        });
    }

    public void Dispose() => _recorded.ForEach(recorded => recorded.Graph.Dispose());

    private ReadOnlySpan<Command> Commands => _commands.AsSpan(0, _count);

    private ReadOnlySpan<Argument> Arguments => _arguments.AsSpan(0, _argumentCount);

    private void Note(Command command, ReadOnlySpan<Argument> arguments)
    {
        if (_count == _commands.Length)
            Array.Resize(ref _commands, 2 * _count);
        if (_argumentCount + arguments.Length > _arguments.Length)
            Array.Resize(ref _arguments, 2 * _arguments.Length);
        _commands[_count++] = command;
        arguments.CopyTo(_arguments.AsSpan(_argumentCount));
        _argumentCount += arguments.Length;
    }

    private Recorded? Find()
    {
        // There are few lists, and two that differ do so in their first arguments: the row bucket, and the weights' addresses.
        foreach (Recorded recorded in _recorded)
        {
            if (Bytes(Arguments).SequenceEqual(Bytes<Argument>(recorded.Arguments))
                && Bytes(Commands).SequenceEqual(Bytes<Command>(recorded.Commands)))
            {
                return recorded;
            }
        }

        return null;

        static ReadOnlySpan<byte> Bytes<T>(ReadOnlySpan<T> list)
            where T : struct => MemoryMarshal.AsBytes(list);
    }

    private void Run()
    {
        ReadOnlySpan<Argument> left = Arguments;
        foreach (ref readonly Command command in Commands)
        {
            ReadOnlySpan<Argument> a = left[..command.ArgumentCount];
            if (command.Function != 0)
            {
                _kernels.Launch(
                    command.Function, _device.Stream, new Grid(command.X, command.Y, command.Z), command.Threads, command.SharedBytes, a);
            }
            else
            {
                _matMul.Multiply(
                    a[0].Pointer, a[1].Pointer, a[2].Pointer, a[3].Pointer, a[4].Int, a[5].Int, a[6].Int, (MatMulOutput)a[7].Int);
            }

            left = left[command.ArgumentCount..];
        }
    }

    private CudaGraph Capture()
    {
        _device.MakeCurrent();
        CudaGraph.BeginCapture(_device.Stream);
        try
        {
            Run();
        }
        catch
        {
            CudaGraph.AbandonCapture(_device.Stream); // the first failure is the one to report
            throw;
        }

        return _device.EndCapture();
    }

    private sealed record Recorded(Command[] Commands, Argument[] Arguments, CudaGraph Graph);

    /// <summary>A kernel's launch; without a function a matmul. No padding: lists are compared as bytes.</summary>
    private readonly struct Command(nint function, Grid grid, int threads, int sharedBytes, int argumentCount)
    {
        public readonly nint Function = function;
        public readonly int X = grid.X, Y = grid.Y, Z = grid.Z;
        public readonly int Threads = threads;
        public readonly int SharedBytes = sharedBytes;
        public readonly int ArgumentCount = argumentCount;
    }
}
